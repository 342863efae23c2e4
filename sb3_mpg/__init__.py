"""Stable-Baselines3 algorithms that learn from data and from a differentiable model at the same time."""

from sb3_mpg.common.callbacks import AsyncEvalCallback
from sb3_mpg.common.models import DynamicsModel, PriorModel, check_prior_model
from sb3_mpg.dvpg import DVPG
from sb3_mpg.mpg import MPG
from sb3_mpg.nadp import NStepADP
from sb3_mpg.ndpg import NStepDPG
from sb3_mpg.version import __version__

__all__ = [
    "DVPG",
    "MPG",
    "AsyncEvalCallback",
    "DynamicsModel",
    "NStepADP",
    "NStepDPG",
    "PriorModel",
    "__version__",
    "check_prior_model",
]
