from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.checker import check_prior_model
from sb3_mpg.common.models.dynamics import DynamicsModel

__all__ = ["DynamicsModel", "PriorModel", "check_prior_model"]
