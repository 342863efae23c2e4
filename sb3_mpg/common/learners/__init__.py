from sb3_mpg.common.learners.base import Learners, LearnerSettings, PoolSettings, TrainingInputs
from sb3_mpg.common.learners.in_process import InProcessLearner
from sb3_mpg.common.learners.multiprocess import MultiprocessLearners

__all__ = ["InProcessLearner", "LearnerSettings", "Learners", "MultiprocessLearners", "PoolSettings", "TrainingInputs"]
