#!/usr/bin/env bash
# torch: `torch.onnx.export(..., dynamo=True, dynamic_shapes=...)` writes a file for the batch size of the example alone when the
# module calls `len(tensor)`, although a dimension was asked for that is of any size. There is neither an error nor a warning.
# `torch.export.export` refuses the same module and the same dimension.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
    onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import onnx
import onnxscript
import torch


class Policy(torch.nn.Module):
    """Adds a column that every row of the batch shares."""

    def forward(self, observations):
        return torch.cat([observations, torch.ones(len(observations), 1)], dim=1)


policy, example = Policy().eval(), (torch.zeros(2, 3),)
shapes = ({0: torch.export.Dim("batch")},)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    program = torch.onnx.export(policy, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
told = [str(warning.message) for warning in caught if "batch" in str(warning.message)]
(first, second) = program.model_proto.graph.input[0].type.tensor_type.shape.dim
try:
    torch.export.export(policy, example, dynamic_shapes=shapes)
    refusal = None
except Exception as error:
    refusal = str(error).splitlines()[0]
print(f"torch {torch.__version__}, onnx {onnx.__version__}, onnxscript {onnxscript.__version__}")
print("expected: an input of (batch, 3), as asked for, or an error")
print(f"seen: an input of ({first.dim_param or first.dim_value}, {second.dim_value}), warnings of it: {told}")
print(f"torch.export.export: {refusal}")
as_recorded = first.dim_value == 2 and not told and refusal is not None
sys.exit(0 if as_recorded else "this has changed")
PYTHON
