#!/usr/bin/env bash
# SB3's `save` opens (and so empties) an existing file before it pickles the algorithm. If something cannot be pickled, `save` raises
# an exception as it should, and the checkpoint that was there before is gone: a file of 0 bytes is left.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
    stable_baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import threading
from pathlib import Path

import gymnasium
import stable_baselines3
import torch
from stable_baselines3 import PPO

model = PPO("MlpPolicy", "Pendulum-v1")
model.save("checkpoint")
before = Path("checkpoint.zip").stat().st_size
PPO.load("checkpoint")

# Something that a user keeps with the algorithm, and that cannot be pickled
model.lock = threading.Lock()
error = None
try:
    model.save("checkpoint")
except TypeError as raised:
    error = raised
after = Path("checkpoint.zip").stat().st_size
print(f"stable_baselines3 {stable_baselines3.__version__}, gymnasium {gymnasium.__version__}, torch {torch.__version__}")
print(f"expected: `save` raises an exception, and the earlier checkpoint of {before} bytes is still there")
print(f"seen: {type(error).__name__}: {error}; the file has {after} bytes")
as_recorded = before > 0 and isinstance(error, TypeError) and after == 0
sys.exit(0 if as_recorded else "this has changed")
PYTHON
