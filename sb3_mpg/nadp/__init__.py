from sb3_mpg.nadp.nadp import NStepADP

__all__ = ["NStepADP"]
