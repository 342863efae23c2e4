#!/usr/bin/env bash
# SB3: `copy.deepcopy(model)` copies an algorithm with its environment and replay buffer, and the copy can go on learning. With a
# `VecNormalize` around the environment, the same call gives a copy whose wrapper is empty (`venv` is None). Nothing says so: the
# copy predicts, and shows spaces and number of environments, until `learn` fails with "'NoneType' object has no attribute".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
    stable_baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import gymnasium
import stable_baselines3
import torch
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


def outcome(env):
    """What becomes of a copy that goes on learning."""
    model = TD3("MlpPolicy", env, learning_starts=10, buffer_size=100).learn(20)
    copied = copy.deepcopy(model)
    copied.predict(copied.get_env().observation_space.sample())
    try:
        copied.learn(5, reset_num_timesteps=False)
    except AttributeError as error:
        return f"AttributeError: {error}"
    return f"{copied.num_timesteps} steps"


plain = outcome(make_vec_env("Pendulum-v1", 1))
normalized = outcome(VecNormalize(make_vec_env("Pendulum-v1", 1)))
print(f"stable_baselines3 {stable_baselines3.__version__}, gymnasium {gymnasium.__version__}, torch {torch.__version__}")
print("expected: a deep copy goes on learning to 25 steps, with VecNormalize as without; or the copy is refused")
print(f"seen: without {plain}; with VecNormalize {normalized}")
as_recorded = plain == "25 steps" and normalized == "AttributeError: 'NoneType' object has no attribute 'step_async'"
sys.exit(0 if as_recorded else "this has changed")
PYTHON
