from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.checking.checker import check_prior_model

__all__ = ["PriorModel", "check_prior_model"]
