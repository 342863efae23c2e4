"""Stable-Baselines3 algorithms that learn from data and from a differentiable model at the same time."""

from pathlib import Path

from sb3_mpg.common.callbacks import AsyncEvalCallback
from sb3_mpg.common.models import PriorModel, check_prior_model
from sb3_mpg.mpg import MPG
from sb3_mpg.nadp import NStepADP
from sb3_mpg.ndpg import NStepDPG

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()

__all__ = ["MPG", "AsyncEvalCallback", "NStepADP", "NStepDPG", "PriorModel", "__version__", "check_prior_model"]
