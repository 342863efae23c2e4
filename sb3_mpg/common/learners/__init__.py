from sb3_mpg.common.learners.base import InProcessLearner, Learners, LearnerSettings
from sb3_mpg.common.learners.multiprocess import MultiprocessLearners

__all__ = ["InProcessLearner", "LearnerSettings", "Learners", "MultiprocessLearners"]
