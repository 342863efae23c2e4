from sb3_mpg.mpg.mpg import MPG
from sb3_mpg.mpg.policies import MlpPolicy

__all__ = ["MPG", "MlpPolicy"]
