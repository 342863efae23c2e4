from sb3_mpg.mpg.mpg import MPG
from sb3_mpg.mpg.policies import MlpPolicy, MultiInputPolicy

__all__ = ["MPG", "MlpPolicy", "MultiInputPolicy"]
