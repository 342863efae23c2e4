#!/usr/bin/env bash
# torch: where `torch.export.export` fails within `torch.vmap` of a gradient, `vmap` is never left. The exception can be caught, but
# from then on every `torch.randn` of the process raises, as do new layers, dropout and samples of distributions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


class Gradient(torch.nn.Module):
    """The gradient of a cost at each state of a batch."""

    def forward(self, states):
        return torch.vmap(torch.func.grad(lambda state: (state**2).sum()))(states)


states = torch.zeros(2, 3)
assert Gradient()(states).shape == (2, 3)
refusal = after = None
try:
    torch.export.export(Gradient(), (states,), strict=True)
except Exception as error:
    refusal = str(error).splitlines()[0]
try:
    torch.randn(3)
except RuntimeError as error:
    after = str(error).split(".")[0]
print(f"torch {torch.__version__}")
print("expected: after an export that failed and was caught, torch.randn(3) gives three numbers")
print(f"seen: the export raises {refusal!r}; torch.randn(3) raises {after!r}")
as_recorded = refusal is not None and after is not None and "vmap" in after
sys.exit(0 if as_recorded else "this has changed")
PYTHON
