#!/usr/bin/env bash
# torch: `functional_call` replaces the weights of a network for one call and restores them. If a layer of the network has two
# names, as a features extractor that keeps a layer as an attribute and in a Sequential, the replaced weights stay. They are plain
# tensors, so the network lists fewer parameters, and an optimizer trains weights that the network no longer uses. There is
# neither an error nor a warning; `tie_weights=False` restores all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch as th
from torch.func import functional_call


class Network(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = th.nn.Linear(2, 2)
        self.layers = th.nn.Sequential(self.first, th.nn.ReLU())

    def forward(self, inputs):
        return self.layers(inputs)


def after_a_call(tie_weights):
    network = Network()
    weight = network.first.weight
    frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
    functional_call(network, frozen, (th.ones(1, 2),), tie_weights=tie_weights)
    return network.first.weight is weight, isinstance(network.first.weight, th.nn.Parameter)


tied, untied = after_a_call(True), after_a_call(False)
print(f"torch {th.__version__}")
print("expected: after the call the layer has its own weight again, a Parameter: (True, True), by default and without ties")
print(f"seen: by default {tied}, with tie_weights=False {untied}")
sys.exit(0 if (tied, untied) == ((False, False), (True, True)) else "this has changed")
PYTHON
