#!/usr/bin/env bash
# torch: the norm of a float32 tensor depends on its strides. A weight that is used through a transposed copy, as
# `w.t().contiguous().t()`, gets a gradient with transposed strides, so that `clip_grad_norm_` scales by another number, in the
# last bits, than for a contiguous copy of the same gradient, such as one that came from another process.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch as th

th.set_num_threads(1)
differ = 0
for seed in range(100):
    generator = th.Generator().manual_seed(seed)
    weight = th.randn(256, 7, generator=generator, requires_grad=True)
    inputs = th.randn(64, 7, generator=generator)
    (gradient,) = th.autograd.grad((inputs @ weight.t().contiguous().t().t()).square().sum(), weight)
    copy = gradient.contiguous()
    assert th.equal(gradient, copy)
    differ += th.linalg.vector_norm(gradient).item() != th.linalg.vector_norm(copy).item()
strides = gradient.stride(), weight.stride()
print(f"torch {th.__version__}")
print("expected: equal tensors have equal norms, and a gradient has the strides of its parameter")
print(f"seen: strides {strides[0]} for a parameter of {strides[1]}; {differ} of 100 norms differ")
as_recorded = strides == ((1, 256), (7, 1)) and differ > 0
sys.exit(0 if as_recorded else "this has changed")
PYTHON
