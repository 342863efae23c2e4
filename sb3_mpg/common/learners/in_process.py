"""Gradients computed in the main process."""

from sb3_mpg.common.learners.base import Learners, TrainingInputs
from sb3_mpg.common.type_aliases import GradientResult
from sb3_mpg.common.update import Update


class InProcessLearner(Learners):
    """
    Computes the gradients in the main process.

    :param update: computes gradients
    """

    def __init__(self, update: Update):
        self.update = update

    def next_result(self, n_updates: int, inputs: TrainingInputs) -> GradientResult:
        settings = inputs.settings_of(n_updates)
        return self.update.gradients_of_update(n_updates, inputs.batch_size, inputs.replay_buffer, inputs.units, settings)
