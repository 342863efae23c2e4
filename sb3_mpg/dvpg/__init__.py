from sb3_mpg.dvpg.dvpg import DVPG
from sb3_mpg.dvpg.policies import DVPGPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["DVPG", "DVPGPolicy", "MlpPolicy", "MultiInputPolicy"]
