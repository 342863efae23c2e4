#!/usr/bin/env bash
# SB3: an off-policy algorithm that chooses its own actions overrides `_sample_action`, and reads what the environment shows in
# `_last_original_obs`, "the last observation before normalisation". With `VecNormalize` that is the observation of now. Without it,
# from the second step on, it is the one before: `_store_transition` sets it to the old observation and only a `VecNormalize`
# renews it. A planner that reads it acts one step late, and nothing shows it but worse returns.
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
import numpy as np
import stable_baselines3
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


class Planning(TD3):
    """Notes how many steps old the original observation is when an action is chosen."""

    def _sample_action(self, *args, **kwargs):
        shown = self.get_env()
        shown = shown.get_original_obs() if isinstance(shown, VecNormalize) else self._last_obs
        self.history = [*getattr(self, "history", []), np.array(shown)]
        ages = [age for age, seen in enumerate(reversed(self.history)) if np.array_equal(seen, self._last_original_obs)]
        self.ages = [*getattr(self, "ages", []), ages[0] if ages else None]
        return super()._sample_action(*args, **kwargs)


def ages_in(env):
    return Planning("MlpPolicy", env, learning_starts=100, buffer_size=100).learn(10).ages[1:]


plain, normalized = ages_in(make_vec_env("Pendulum-v1", 1)), ages_in(VecNormalize(make_vec_env("Pendulum-v1", 1)))
print(f"stable_baselines3 {stable_baselines3.__version__}, gymnasium {gymnasium.__version__}, numpy {np.__version__}")
print("expected: `_last_original_obs` is the observation of now, with VecNormalize as without")
print(f"seen: steps of age without {plain}; with VecNormalize {normalized}")
sys.exit(0 if set(plain) == {1} and set(normalized) == {0} else "this has changed")
PYTHON
