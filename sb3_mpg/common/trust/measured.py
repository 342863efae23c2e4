"""Trust in the model, from measured errors of its gradients or from a fixed rule."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import numpy as np

from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.model_fitting import ModelFitting
from sb3_mpg.common.models.base import PriorModel
from sb3_mpg.common.models.loading import name_of
from sb3_mpg.common.models.trainable import CorrectedModel
from sb3_mpg.common.models.windows import MIN_WINDOWS
from sb3_mpg.common.rollouts.steps import QFunction, RolloutContext
from sb3_mpg.common.trust.gradient_errors import (
    action_gradients,
    measure_gradient_errors,
    warn_of_errors,
)
from sb3_mpg.common.trust.report import Measurement, TrustReport, make_trust_report
from sb3_mpg.common.trust.terminations import discounted_by_trust, trust_in_ends
from sb3_mpg.common.trust.weighting import WeightingRule

# Number of latest measurements that the trust in blind returns is averaged over
N_AVERAGED = 3
# Measurements are rarer by this factor after so many updates. Before, they would cost more steps than they save time
RARER, N_FAST_UPDATES = 3, 2000
# Number of latest steps that a report compares the model with
N_REPORTED_STEPS = 5000


class Trust(ABC):
    """
    Weights of the horizons, and the trust in the model that follows from them.

    :param rule: the weighting rule
    :param is_corrected: whether the user's model is corrected
    :param is_learned: whether the user's model is itself learned from data
    """

    def __init__(self, rule: WeightingRule, is_corrected: bool, is_learned: bool = False):
        self.rule = rule
        self.is_corrected = is_corrected
        self.is_learned = is_learned
        #: Errors of the gradients and weights, in the order of the updates
        self.measurements: list[Measurement] = []

    @property
    def longest_horizon(self) -> int:
        """Number of model steps of the longest rollout."""
        return max(self.rule.horizons)

    @property
    def uses_model(self) -> bool:
        """Whether any horizon has model steps."""
        return self.longest_horizon > 0

    def weights(self, n_updates: int) -> dict[int, float]:
        """
        :param n_updates: number of the update
        :return: weight of each horizon
        """
        return self.rule(n_updates)

    def model_weight(self, n_updates: int) -> float:
        """
        :param n_updates: number of the update
        :return: total weight of the horizons with model steps, from 0 to 1
        """
        return 1 - self.rule(n_updates).get(0, 0.0)

    @property
    @abstractmethod
    def learns(self) -> bool:
        """
        Whether rollouts may replace data in proportion to their weight. If the model does not learn, all rollouts share its
        mistakes, and the critics would learn these.
        """

    def in_model(self, n_updates: int) -> float:
        """
        :param n_updates: number of the update
        :return: trust in the model: the share to which its rollouts may replace data, from 0 to 1
        """
        return self.model_weight(n_updates) if self.learns else 0.0

    def in_blind_returns(self, n_updates: int) -> float:
        """
        :param n_updates: number of the update
        :return: trust in the returns of the longest rollouts where their derivative is blind, from 0 to 1. The critics learn
            from such rollouts, and the policy from the critics
        """
        return 0.0

    @abstractmethod
    def prefers_model(self, n_updates: int) -> bool:
        """
        :param n_updates: number of the update
        :return: whether the weight of the model is large enough to keep critics from extrapolating freely
        """

    def measure(
        self,
        n_updates: int,
        context: RolloutContext,
        q_functions: Sequence[QFunction],
        fitting: ModelFitting,
        recorded: RecordedSteps,
    ) -> dict[str, float]:
        """
        Measure the errors of the gradients if a measurement is due.

        :param n_updates: number of the update
        :param context: policy, model, units, discount factor and steps
        :param q_functions: a critic for each member of the model
        :param fitting: the model and its fitting
        :param recorded: the recorded steps
        :return: values to log
        """
        return {}

    def check_comparison(self, n_critics: int, n_members: int) -> None:  # noqa: B027  # only measurements compare them
        """
        :param n_critics: number of critics
        :param n_members: number of members of the model
        :raises ValueError: when there are too few to compare
        """

    def report(self, model: PriorModel, is_corrected: bool, recorded: RecordedSteps, gamma: float) -> TrustReport:
        """
        :param model: the model of the rollouts
        :param is_corrected: whether its correction is used, if it has one
        :param recorded: the recorded steps
        :param gamma: discount factor of the returns
        :return: the measurements, and the prediction errors of rollouts along recorded actions
        :raises ValueError: when too few steps are recorded
        """
        windows = recorded.windows(N_REPORTED_STEPS, self.longest_horizon)
        if windows is None or len(windows.lengths) < MIN_WINDOWS:
            raise ValueError("Nothing is recorded to compare the model with: call `learn` or `load_replay_buffer` first.")
        names = recorded.flat.names
        return make_trust_report(model, is_corrected, windows, gamma, self.rule.horizons, self.measurements, names)

    def forget(self) -> None:
        """Drop all measurements, because the model was replaced."""
        self.measurements = []
        self.rule.forget()


class FixedTrust(Trust):
    """
    Trust without measurements. The errors of a corrected prior model are unknown, so only a model that is learned as a whole
    may replace data.
    """

    @property
    def learns(self) -> bool:
        return self.is_learned

    def prefers_model(self, n_updates: int) -> bool:
        return self.uses_model


class MeasuredTrust(Trust):
    """
    Trust that follows the measured errors of the gradients, see :mod:`sb3_mpg.common.trust.gradient_errors`.

    :param rule: a weighting rule that needs errors
    :param is_corrected: whether the user's model is corrected; otherwise it is compared with a correction that is not used
    :param is_learned: whether the user's model is itself learned from data
    :param n_states: number of replayed states at which errors are measured
    :param every: number of updates between two measurements at first; later they are rarer
    """

    def __init__(
        self, rule: WeightingRule, is_corrected: bool, is_learned: bool = False, n_states: int = 128, every: int = 20
    ):
        super().__init__(rule, is_corrected, is_learned)
        self.n_states = n_states
        self.every = every

    @property
    def learns(self) -> bool:
        return self.is_corrected or self.is_learned

    def prefers_model(self, n_updates: int) -> bool:
        return self.model_weight(n_updates) >= 0.5

    def in_model(self, n_updates: int) -> float:
        return max(super().in_model(n_updates), self.in_blind_returns(n_updates))

    def in_blind_returns(self, n_updates: int) -> float:
        latest = [measurement.gradients for measurement in self.measurements[-N_AVERAGED:]]
        if not latest or not self.learns:
            return 0.0
        return float(
            np.mean([measured.is_blind.any() * measured.trust_in_returns * measured.trust_in_ends for measured in latest])
        )

    def check_comparison(self, n_critics: int, n_members: int) -> None:
        if n_critics < 2:
            raise ValueError(
                "Measured weights compare the critics with each other, of which there is one; give `policy_kwargs` an "
                "`n_critics` of 2, or take another `weighting`."
            )
        if n_members < 2:
            raise ValueError(
                "Measured weights compare the members of the model with each other, of which there is one; give the model an "
                "`n_members` of 2 or more, or take another `weighting`."
            )

    def measure(
        self,
        n_updates: int,
        context: RolloutContext,
        q_functions: Sequence[QFunction],
        fitting: ModelFitting,
        recorded: RecordedSteps,
    ) -> dict[str, float]:
        # What a model is worth changes fast at first. Measure at once if there are no measurements, as for the model of a new
        # environment
        every = self.every if n_updates <= N_FAST_UPDATES else RARER * self.every
        if self.measurements and (n_updates - 1) % every != 0:
            return {}
        model = fitting.model
        validation_error = fitting.validation_error(recorded)
        observations = recorded.sample_observations(self.n_states)
        horizons = self.rule.horizons
        measured = measure_gradient_errors(
            partial(action_gradients, observations, context, q_functions, horizons),
            model,
            horizons,
            # Rollouts use the prior model if its correction is not used
            judges_prior=isinstance(model, CorrectedModel) and not self.learns,
            held_out_steps=lambda: fitting.held_out_steps(recorded),
        )
        measured = measured._replace(trust_in_ends=trust_in_ends(model, recorded, self.longest_horizon))
        errors = np.where(measured.is_excluded, np.inf, measured.errors)
        self.rule.observe(discounted_by_trust(errors, horizons, measured.trust_in_ends))
        warn_of_errors(measured, name_of(model), [earlier.gradients for earlier in self.measurements])
        error_or_nan = float("nan") if validation_error is None else validation_error
        self.measurements.append(Measurement(n_updates, measured, self.rule.weights(n_updates), error_or_nan))
        logs = {} if validation_error is None else {"model/validation_error": validation_error}
        for horizon, error, standard_error in zip(horizons, measured.errors, measured.standard_errors, strict=True):
            logs[f"horizons/error_{horizon}"] = error
            logs[f"horizons/error_{horizon}_se"] = standard_error
        return logs


def make_trust(rule: WeightingRule, is_corrected: bool, is_learned: bool = False) -> Trust:
    """
    :param rule: the weighting rule
    :param is_corrected: whether the user's model is corrected
    :param is_learned: whether the user's model is itself learned from data
    :return: measured trust for a rule that needs errors, otherwise fixed trust
    """
    return (MeasuredTrust if rule.needs_errors else FixedTrust)(rule, is_corrected, is_learned)


def renew_trust(trust: Trust, rule: WeightingRule, is_corrected: bool, is_learned: bool) -> Trust:
    """
    :param trust: the trust so far; its settings stay if the new rule is of the same kind
    :param rule: the weighting rule from now on
    :param is_corrected: whether the user's model is corrected from now on
    :param is_learned: whether the user's model is itself learned from data
    :return: the trust from now on, without measurements that were made for other horizons
    """
    if isinstance(trust, MeasuredTrust) == rule.needs_errors:
        trust.rule, trust.is_corrected, trust.is_learned = rule, is_corrected, is_learned
        renewed = trust
    else:
        renewed = make_trust(rule, is_corrected, is_learned)
        renewed.measurements = trust.measurements
    if any(measurement.gradients.horizons != rule.horizons for measurement in renewed.measurements):
        renewed.measurements = []
    return renewed
