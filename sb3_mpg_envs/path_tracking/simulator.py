"""Simulator of the path tracking task."""

import numpy as np
from gymnasium import spaces

from sb3_mpg_envs.path_tracking import dynamics
from sb3_mpg_envs.path_tracking.dynamics import PAPER_VEHICLE, TrackingState, VehicleParameters
from sb3_mpg_envs.path_tracking.model import PathTrackingModel
from sb3_mpg_envs.simulator import BatchSimulator, Columns, Renderer

# Stands for "unbounded" where the task sets no limit: infinite bounds make the environment checkers complain
UNBOUNDED = 1e6


class PathTrackingSimulator(BatchSimulator):
    """
    Many vehicles that track one path; see :class:`sb3_mpg_envs.path_tracking.env.PathTrackingEnv` for the task.

    :param num_agents: number of vehicles
    :param vehicle: parameters of the vehicles
    :param early_reset: end an episode when the vehicle leaves the useful region
    :param early_reset_terminates: report these ends as ``terminated`` instead of ``truncated``
    :param early_reset_penalty: subtracted from the reward of such a step; only used with ``early_reset_terminates``
    :param start_width: scales the spreads of the start distribution
    """

    def __init__(
        self,
        num_agents: int,
        *,
        vehicle: VehicleParameters = PAPER_VEHICLE,
        early_reset: bool = True,
        early_reset_terminates: bool = False,
        early_reset_penalty: float = 100.0,
        start_width: float = 1.0,
    ):
        low = [dynamics.MIN_SPEED - dynamics.REFERENCE_SPEED, -UNBOUNDED, -UNBOUNDED, -UNBOUNDED, -np.pi, 0.0]
        high = [
            dynamics.MAX_SPEED - dynamics.REFERENCE_SPEED,
            UNBOUNDED,
            UNBOUNDED,
            UNBOUNDED,
            np.pi,
            dynamics.PATH_PERIOD,
        ]
        super().__init__(
            num_agents,
            spaces.Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32), dtype=np.float32),
            dynamics.MAX_CONTROLS,
            early_reset=early_reset,
            early_reset_terminates=early_reset_terminates,
            early_reset_penalty=early_reset_penalty,
            start_width=start_width,
        )
        self.vehicle = vehicle

    def _allocate(self, num_agents: int) -> None:
        super()._allocate(num_agents)
        # Lateral position and yaw angle of the path where the vehicles are: each step would compute them again
        self._path = (np.full(num_agents, np.nan), np.full(num_agents, np.nan))

    def _write_states(self, states: np.ndarray, columns: Columns) -> None:
        super()._write_states(states, columns)
        y_ref, phi_ref = self._path
        y_ref[columns], phi_ref[columns] = dynamics.path_reference(TrackingState(*states).x, "path", np)

    def prior_model(self) -> PathTrackingModel:
        terminates = self.early_reset and self.early_reset_terminates
        return PathTrackingModel(
            vehicle=self.vehicle,
            terminates=terminates,
            early_reset_penalty=self.early_reset_penalty if terminates else 0.0,
        )

    def make_renderer(self, render_mode: str) -> Renderer:
        # pygame is optional: import it only where it is needed
        from sb3_mpg_envs.path_tracking.rendering import PathTrackingRenderer

        return PathTrackingRenderer(render_mode, self.vehicle, fps=self.metadata["render_fps"])

    def _start_states(self, n_starts: int) -> np.ndarray:
        rng, width = self.np_random, self.start_width
        x = dynamics.START_X_CENTRE + width * dynamics.START_X_HALF_WIDTH * rng.uniform(-1, 1, n_starts)
        lateral_error = width * dynamics.START_LATERAL_ERROR_STD * rng.standard_normal(n_starts)
        heading_error = width * dynamics.START_HEADING_ERROR_STD * rng.standard_normal(n_starts)
        u = dynamics.REFERENCE_SPEED + width * dynamics.START_SPEED_HALF_WIDTH * rng.uniform(-1, 1, n_starts)
        u = np.clip(u, dynamics.MIN_SPEED, dynamics.MAX_SPEED)
        slip_angle = width * dynamics.START_SLIP_ANGLE_STD * rng.standard_normal(n_starts)
        yaw_rate = width * dynamics.START_YAW_RATE_STD * rng.standard_normal(n_starts)
        states = [u - dynamics.REFERENCE_SPEED, u * np.tan(slip_angle), yaw_rate, lateral_error, heading_error, x]
        return self._canonical_states(np.stack(states))

    def _canonical_states(self, states: np.ndarray) -> np.ndarray:
        state = TrackingState(*states)
        speed = np.clip(state.speed_error + dynamics.REFERENCE_SPEED, dynamics.MIN_SPEED, dynamics.MAX_SPEED)
        return np.stack(
            state._replace(
                speed_error=speed - dynamics.REFERENCE_SPEED,
                heading_error=dynamics.wrap_angle(state.heading_error, np),
                x=np.remainder(state.x, dynamics.PATH_PERIOD),
            )
        )

    def _transition(self, states: np.ndarray, controls: np.ndarray, columns: Columns) -> np.ndarray:
        steering, acceleration = controls
        y_ref, phi_ref = self._path
        next_state, (y_ref[columns], phi_ref[columns]) = dynamics.tracking_step(
            TrackingState(*states),
            (y_ref[columns], phi_ref[columns]),
            steering,
            acceleration,
            self.vehicle,
            dynamics.N_SUBSTEPS,
            "path",
            np,
        )
        # As np.stack(), with less overhead
        return np.concatenate(next_state).reshape(states.shape)

    def _rewards(self, states: np.ndarray, controls: np.ndarray, next_states: np.ndarray) -> np.ndarray:
        steering, acceleration = controls
        return dynamics.tracking_reward(TrackingState(*states), steering, acceleration)

    def _is_outside(self, states: np.ndarray) -> np.ndarray:
        return dynamics.is_off_path(TrackingState(*states))
