#!/usr/bin/env bash
# SB3's `load(path, name=value)` writes its keyword arguments into `__dict__`. Where a subclass keeps `name` as a property, reading
# it goes to the property, and the value that `load` was given is ignored without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
    stable_baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import gymnasium
import stable_baselines3
import torch
from stable_baselines3 import TD3


class WithSettings(TD3):
    """Keeps a setting in an object of its own, and shows it as a property with a setter."""

    def __init__(self, *args, **kwargs):
        self.settings = {"target_policy_noise": 0.2}
        super().__init__(*args, **kwargs)

    @property
    def target_policy_noise(self):
        return self.settings["target_policy_noise"]

    @target_policy_noise.setter
    def target_policy_noise(self, value):
        self.settings["target_policy_noise"] = value


WithSettings("MlpPolicy", "Pendulum-v1", buffer_size=10).save("agent")
loaded = WithSettings.load("agent", target_policy_noise=0.7)
print(f"stable_baselines3 {stable_baselines3.__version__}, gymnasium {gymnasium.__version__}, torch {torch.__version__}")
print("expected: load(..., target_policy_noise=0.7) gives an algorithm with 0.7, as for a plain attribute")
print(f"seen: {loaded.target_policy_noise}, while __dict__ holds {loaded.__dict__.get('target_policy_noise')}")
as_recorded = loaded.target_policy_noise == 0.2 and loaded.__dict__.get("target_policy_noise") == 0.7
sys.exit(0 if as_recorded else "this has changed")
PYTHON
