"""Prior models of the path tracking task."""

import math

import torch as th

from sb3_mpg_envs.model import EarlyResetModel
from sb3_mpg_envs.path_tracking.dynamics import (
    MAX_CONTROLS,
    N_SUBSTEPS,
    PATH_PERIOD,
    Reference,
    TrackingState,
    PAPER_VEHICLE,
    VehicleParameters,
    is_off_path,
    path_reference,
    tracking_reward,
    tracking_step,
)


class PathTrackingModel(EarlyResetModel):
    """
    A differentiable model of ``PathTracking-v0``. Its state is the observation, ``(B, 6)``.

    The default is the rough model of the paper, equation (17). It has three errors: the path is a straight line, the
    dynamics are integrated in a single step of 0.1 s, and each step moves the vehicle to the side by N(0.5, 0.01) m (mean
    and standard deviation). :meth:`exact` makes the model that agrees with the simulator. Other arguments make worse models:
    ``steering_gain=-1.0`` steers to the wrong side.

    Unlike the environment, the model does not clip actions to the action space. Clipping would remove the gradient at its
    border, and the actions of a policy are inside of it.

    :param vehicle: parameters of the vehicle
    :param n_substeps: number of integration steps per step of the environment
    :param reference: path of the model, a straight line (``"straight"``) or the path of the task (``"path"``)
    :param lateral_bias: added to the lateral error in each step, m
    :param lateral_noise: standard deviation of the noise on the lateral error, m; only drawn in training mode
    :param steering_gain: factor on the steering angle in the dynamics
    :param terminates: the early-reset region is terminal (for environments with ``early_reset_terminates=True``)
    :param early_reset_penalty: subtracted from the reward of a step into the terminal region; only used with ``terminates``
    """

    def __init__(
        self,
        vehicle: VehicleParameters = PAPER_VEHICLE,
        n_substeps: int = 1,
        reference: Reference = "straight",
        lateral_bias: float = 0.5,
        lateral_noise: float = 0.01,
        steering_gain: float = 1.0,
        terminates: bool = False,
        early_reset_penalty: float = 0.0,
    ):
        super().__init__(terminates, early_reset_penalty)
        if reference not in ("straight", "path"):
            raise ValueError(f"reference must be 'straight' or 'path', got {reference!r}")
        if n_substeps < 1:
            raise ValueError(f"n_substeps must be at least 1, got {n_substeps}")
        self.vehicle = vehicle
        self.n_substeps = n_substeps
        self.reference: Reference = reference
        self.lateral_bias = lateral_bias
        self.lateral_noise = lateral_noise
        self.steering_gain = steering_gain

    @classmethod
    def exact(
        cls,
        vehicle: VehicleParameters = PAPER_VEHICLE,
        terminates: bool = False,
        early_reset_penalty: float = 0.0,
    ) -> "PathTrackingModel":
        """
        Make the model that agrees with the simulator step by step.

        :param vehicle: parameters of the vehicle
        :param terminates: the early-reset region is terminal
        :param early_reset_penalty: subtracted from the reward of a step into the terminal region
        :return: the model
        """
        return cls(
            vehicle=vehicle,
            n_substeps=N_SUBSTEPS,
            reference="path",
            lateral_bias=0.0,
            lateral_noise=0.0,
            terminates=terminates,
            early_reset_penalty=early_reset_penalty,
        )

    @staticmethod
    def _controls(actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        # From [-1, 1] to rad and m/s^2, each (B,)
        max_steering, max_acceleration = MAX_CONTROLS
        steering, acceleration = actions.unbind(-1)
        return max_steering * steering, max_acceleration * acceleration

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        steering, acceleration = self._controls(actions)
        state = TrackingState(*states.unbind(-1))
        next_state, _ = tracking_step(
            state,
            path_reference(state.x, self.reference, th),
            self.steering_gain * steering,
            acceleration,
            self.vehicle,
            self.n_substeps,
            self.reference,
            th,
        )
        lateral_error = next_state.lateral_error + self.lateral_bias
        if self.training and self.lateral_noise > 0:
            lateral_error = lateral_error + self.lateral_noise * th.randn_like(lateral_error)
        return th.stack(next_state._replace(lateral_error=lateral_error), -1)

    def _step_reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return tracking_reward(TrackingState(*states.unbind(-1)), *self._controls(actions))

    def _is_outside(self, states: th.Tensor) -> th.Tensor:
        return is_off_path(TrackingState(*states.unbind(-1)))

    @staticmethod
    def _wrapped(states: th.Tensor, lowest_x: float) -> th.Tensor:
        # Positions in [lowest_x, lowest_x + PATH_PERIOD), heading errors in (-pi, pi], all columns at once. A negative period
        # closes the interval at its upper end; other columns have an infinite one and make no turns
        inf, full_turn = float("inf"), 2 * math.pi
        periods, offsets, turns = states.new_tensor(
            [
                TrackingState(inf, inf, inf, inf, -full_turn, PATH_PERIOD),
                TrackingState(0.0, 0.0, 0.0, 0.0, 0.5, -lowest_x / PATH_PERIOD),
                TrackingState(0.0, 0.0, 0.0, 0.0, -full_turn, PATH_PERIOD),
            ]
        )
        return states - turns * th.floor(states / periods + offsets)

    def state_difference(self, states: th.Tensor, others: th.Tensor) -> th.Tensor:
        return self._wrapped(states - others, -PATH_PERIOD / 2)

    def state_add(self, states: th.Tensor, differences: th.Tensor) -> th.Tensor:
        return self._wrapped(states + differences, 0.0)
