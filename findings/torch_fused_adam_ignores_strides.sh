#!/usr/bin/env bash
# torch: on a CPU, Adam with `fused=True` applies a gradient in the order of memory. Where the strides of `.grad` are not those of
# the parameter, as when autograd comes through a transposed copy of a weight and the gradient is assigned by hand, other weights
# are moved than the gradient belongs to. There is neither an error nor a warning; `fused=False` moves the right ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch as th


def step(fused):
    weight = th.nn.Parameter(th.zeros(3, 2))
    # A linear layer whose weight lies in memory by columns
    by_columns = weight.t().contiguous().t()
    pattern = th.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    outputs = th.eye(2) @ by_columns.t()
    (weight.grad,) = th.autograd.grad((outputs * pattern.t()).sum(), weight)
    assert th.equal(weight.grad, pattern)
    strides = weight.grad.stride()
    th.optim.Adam([weight], lr=1.0, fused=fused).step()
    return strides, weight.detach().sign().int().tolist()


strides, plain = step(fused=False)
_, fused = step(fused=True)
print(f"torch {th.__version__}")
print("expected: the sign of each step is opposite to that of its gradient, [[-1, 1], [1, -1], [-1, -1]], fused or not")
print(f"seen: strides of the gradient {strides} for a weight of (2, 1); not fused {plain}, fused {fused}")
as_recorded = strides == (1, 3) and plain == [[-1, 1], [1, -1], [-1, -1]] and fused == [[-1, 1], [-1, 1], [-1, -1]]
sys.exit(0 if as_recorded else "this has changed")
PYTHON
