from sb3_mpg.ndpg.ndpg import NStepDPG

__all__ = ["NStepDPG"]
