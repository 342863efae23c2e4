"""Fits a trainable model to the steps of the replay buffer while a policy is trained."""

import warnings
from typing import Any

from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.models.judged_ends import misjudged_ends
from sb3_mpg.common.models.learned_ends import MIN_ENDS, N_FITS
from sb3_mpg.common.models.terminations import looks_like_time_limit
from sb3_mpg.common.models.trainable import CorrectedModel, TrainableModel, evaluated
from sb3_mpg.common.models.windows import Transitions
from sb3_mpg.common.saved_object import SavedObject

# Number of held-out steps that tell whether a model has converged
N_HELD_OUT = 1000


class ModelFitting:
    """
    Decides when a trainable model is fitted, and to which steps.

    :param model: the model
    :param batch_size: number of steps for each member of the model in one step of its optimizer
    :param max_scaling_steps: the scales are computed from at most this many of the latest steps
    :param max_fits: largest number of optimizer steps until the model counts as converged, for a model that was rescaled
    :param check_every: number of optimizer steps between two measurements of the held-out error
    :param patience: number of optimizer steps without a lower held-out error until the model counts as converged
    :param n_rollout_steps: rollout-based choices are made on about this many of the latest steps
    """

    def __init__(
        self,
        model: TrainableModel,
        batch_size: int = 256,
        max_scaling_steps: int = 20_000,
        max_fits: int = 2000,
        check_every: int = 50,
        patience: int = 200,
        n_rollout_steps: int = 1000,
    ):
        self.model = model
        self.batch_size = batch_size
        self.max_scaling_steps = max_scaling_steps
        self.max_fits = max_fits
        self.check_every = check_every
        self.patience = patience
        self.n_rollout_steps = n_rollout_steps
        #: Number of recorded steps at the last call of :meth:`prepare` that had an effect, 0 before the first
        self.n_prepared_for = 0
        # Since the last update of the policy
        self._has_just_converged = False
        self._has_warned_of_limit = False

    @property
    def is_prepared(self) -> bool:
        """Whether the model was ever fitted."""
        return self.n_prepared_for > 0

    @property
    def uses_correction(self) -> bool:
        """Whether predictions of the model are those of a prior model with a fitted correction."""
        return self.is_prepared and isinstance(self.model, CorrectedModel) and self.model.is_correction_used

    def use_correction(self, is_used: bool) -> None:
        """
        :param is_used: whether a correction is used from now on, if the model is one
        """
        if isinstance(self.model, CorrectedModel):
            self.model.use_correction(is_used)

    def prepare(self, recorded: RecordedSteps, num_timesteps: int, horizon: int) -> None:
        """
        Before the first update: compute the scales of the model from the recorded steps, and fit it until it has converged.
        Repeated when the number of steps has doubled and the data have shifted. Rollout-based choices are redone each time
        that the number of steps has doubled.

        :param recorded: the recorded steps
        :param num_timesteps: number of environment steps so far; a small replay buffer holds only the latest
        :param horizon: number of model steps of the longest rollout
        """
        n_recorded = max(len(recorded), num_timesteps)
        if n_recorded < 2 * self.n_prepared_for:
            return
        if len(recorded) < self.n_prepared_for and not recorded.is_full:
            return  # the replay buffer was not restored and holds fewer steps than the model was fitted to
        latest = recorded.latest(self.max_scaling_steps)
        if latest is None:
            return
        is_first, self.n_prepared_for = not self.is_prepared, n_recorded
        if is_first or self.model.needs_rescaling(latest):
            self.model.rescale(latest)
            self._fit_until_converged(recorded, self.max_fits)
            self._has_just_converged = True
        if self.model.can_learn_ends and recorded.termination_rate() > 0:
            self._learn_ends(recorded)
            self.model.solve_end_rewards(latest)
        windows = recorded.windows(self.n_rollout_steps, horizon)
        if windows is not None:
            self.model.tune_on_rollouts(windows)

    def _learn_ends(self, recorded: RecordedSteps) -> None:
        """
        Learn where episodes terminate, if enough terminations are recorded. What is learned is used if it is as right as what
        is known without it.

        :param recorded: the recorded steps
        """
        model = self.model
        limit = looks_like_time_limit(recorded.lengths_of_terminated())
        if limit is not None and not self._has_warned_of_limit:
            self._has_warned_of_limit = True
            warnings.warn(
                f"Episodes terminate after {limit} steps, whatever the state: this looks like a time limit, for which the "
                "environment must return truncated=True instead of terminated=True. Otherwise the critics learn that nothing "
                "follows. These terminations are not expected of the model."
            )
        if limit is not None or recorded.n_ends() < MIN_ENDS:
            model.use_learned_ends(False)
            return
        for _ in range(N_FITS):
            self._fit_ends(recorded)
        judged = [recorded.observed_last(self.n_rollout_steps, terminated) for terminated in (True, False)]
        with evaluated(model):
            model.use_learned_ends(False)
            own = misjudged_ends(model, *judged)
            model.use_learned_ends(True)
            model.use_learned_ends(misjudged_ends(model, *judged).is_as_good_as(own))

    def _fit_ends(self, recorded: RecordedSteps) -> None:
        n_members = self.model.n_members
        steps = recorded.sample(self.batch_size * n_members)
        ends = recorded.sample_ends(self.batch_size // 4 * n_members)
        if steps is not None and ends is not None:
            self.model.fit_ends(steps, ends, recorded.termination_rate())

    def fit(self, n_updates: int, recorded: RecordedSteps) -> float | None:
        """
        Fit the model according to its schedule.

        :param n_updates: number of the update
        :param recorded: the recorded steps
        :return: the loss, ``None`` when the model was not fitted
        """
        has_just_converged, self._has_just_converged = self._has_just_converged, False

        def fit_until_converged(max_fits: int) -> float | None:
            return None if has_just_converged else self._fit_until_converged(recorded, max_fits)

        loss = self.model.fitting_schedule.fit(n_updates, lambda: self._fit_once(recorded), fit_until_converged)
        if self.model.learns_ends:
            self._fit_ends(recorded)
        if isinstance(self.model, CorrectedModel) and n_updates % self.check_every == 0:
            held_out = self.held_out_steps(recorded)
            if held_out is not None:
                self.model.choose_outputs(held_out)
        return loss

    def _fit_once(self, recorded: RecordedSteps) -> float | None:
        batch = recorded.sample(self.batch_size * self.model.n_members)
        return None if batch is None else self.model.fit(batch)

    def _fit_until_converged(self, recorded: RecordedSteps, max_fits: int) -> float | None:
        # Always the same steps, so that errors can be compared
        held_out = recorded.sample(N_HELD_OUT, held_out=True)
        best_error, best_step, loss = float("inf"), 0, None
        for step in range(max_fits):
            loss = self._fit_once(recorded)
            if step % self.check_every != 0:
                continue
            # Without held-out steps, the number of optimizer steps is that of the patience
            error = float("inf") if held_out is None else self.model.validation_error(held_out)
            if held_out is not None:
                self.model.keep_best(held_out)
            if error < 0.98 * best_error:
                best_error, best_step = error, step
            elif step - best_step >= self.patience:
                break
        self.model.restore_best()
        return loss

    def held_out_steps(self, recorded: RecordedSteps) -> Transitions | None:
        """
        :param recorded: the recorded steps
        :return: steps that the model is not fitted to, ``None`` while there are none
        """
        return recorded.sample(self.batch_size, held_out=True)

    def validation_error(self, recorded: RecordedSteps) -> float | None:
        """
        :param recorded: the recorded steps
        :return: the model's error on held-out steps, ``None`` while there are none
        """
        held_out = self.held_out_steps(recorded)
        return None if held_out is None else self.model.validation_error(held_out)

    def state(self) -> dict[str, Any]:
        """
        :return: the learned state on the CPU, to be saved; what the model learned is a pickle, see :class:`SavedObject`
        """
        return {"model": SavedObject.of(self.model.learned_state()), "n_prepared_for": self.n_prepared_for}

    def restore(self, state: dict[str, Any] | None) -> bool:
        """
        :param state: what :meth:`state` returned, or ``None``
        :return: whether the state belongs to this model, or is ``None``; otherwise it is not loaded
        """
        if state is None:
            return True
        learned = state["model"].opened()
        is_of_this_model = not isinstance(learned, SavedObject) and self.model.load_learned_state(learned)
        if is_of_this_model:
            self.n_prepared_for = state["n_prepared_for"]
        elif state["n_prepared_for"] > 0:
            warnings.warn(
                "What was learned of another model is forgotten; this model is fitted to the replay buffer before the next "
                "update."
            )
        return is_of_this_model
