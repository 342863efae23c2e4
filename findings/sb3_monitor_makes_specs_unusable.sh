#!/usr/bin/env bash
# SB3's `make_vec_env` wraps each environment in a `Monitor`. Gymnasium lists that wrapper in the environment's `spec`, among those
# whose arguments it did not record, so that `gymnasium.make(spec)` refuses the specification of an environment that SB3 made by
# its id. A plain environment can be made from its own specification, and code that reads `additional_wrappers` to find out
# whether observations were changed sees a wrapper although nothing was changed.
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
from stable_baselines3.common.env_util import make_vec_env


def made_again(spec):
    """Whether an environment can be made from a specification."""
    try:
        gymnasium.make(spec)
    except ValueError as error:
        return f"ValueError: {error}"
    return "made"


plain = gymnasium.make("Pendulum-v1").spec
of_sb3 = make_vec_env("Pendulum-v1", 1).get_attr("spec")[0]
wrappers = [wrapper.name for wrapper in of_sb3.additional_wrappers]
print(f"stable_baselines3 {stable_baselines3.__version__}, gymnasium {gymnasium.__version__}")
print("expected: an environment that was made by its id can be made again from its own specification")
print(f"seen: plain: {made_again(plain)}; of make_vec_env, with the wrappers {wrappers}: {made_again(of_sb3)}")
as_recorded = made_again(plain) == "made" and "Monitor wrapper does not inherit" in made_again(of_sb3) and wrappers == ["Monitor"]
sys.exit(0 if as_recorded else "this has changed")
PYTHON
