"""Simulator of the path tracking task."""

import functools
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mpg_envs.path_tracking import dynamics
from sb3_mpg_envs.path_tracking.dynamics import PAPER_VEHICLE, TrackingState, VehicleParameters
from sb3_mpg_envs.path_tracking.model import PathTrackingModel
from sb3_mpg_envs.simulator import UNBOUNDED, BatchSimulator, Columns, Renderer


class CompiledTracking:
    """
    The equations of motion as one compiled function. It takes half of the time of NumPy and agrees with it to rounding error.

    It is compiled once, for any number of vehicles with the same parameters. A single vehicle is stepped by NumPy. If the
    compilation fails, there is one warning and NumPy steps all vehicles.

    :param vehicle: parameters of all vehicles
    """

    def __init__(self, vehicle: VehicleParameters):
        self.vehicle = vehicle
        self._step: Callable[..., tuple[th.Tensor, ...]] | None = None
        self._has_failed = False

    def __call__(self, states: np.ndarray, path: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, ...]:
        """
        :param states: tracking errors, ``(6, n)``
        :param path: lateral position and yaw angle of the path at the vehicles, ``(2, n)``
        :param controls: front wheel angle and acceleration, ``(2, n)``
        :return: see :func:`numpy_tracking`
        """
        # torch would compile a second function for a single vehicle
        if self._has_failed or states.shape[1] < 2:
            return numpy_tracking(states, path, controls, self.vehicle)
        # torch would compile another function for other strides
        tensors = [th.from_numpy(np.ascontiguousarray(array)) for array in (states, path, controls)]
        try:
            if self._step is None:
                self._step = self._compile(tensors)
            with th.no_grad():
                return tuple(result.numpy() for result in self._step(*tensors))
        except Exception as error:
            self._has_failed = True
            warnings.warn(
                "The equations of motion could not be compiled and run in NumPy, more slowly "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). `compile=False` avoids the attempt."
            )
            return numpy_tracking(states, path, controls, self.vehicle)

    def _compile(self, tensors: Sequence[th.Tensor]) -> Callable[..., tuple[th.Tensor, ...]]:
        def step(states: th.Tensor, path: th.Tensor, controls: th.Tensor) -> tuple[th.Tensor, ...]:
            next_state, next_path, rewards = tracking(states, path, controls, self.vehicle, th)
            return th.stack(next_state), th.stack(next_path), rewards

        # A code object per vehicle: torch reuses a compiled function for all functions that share a code object
        own_step = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
        # Compile for any number of vehicles
        for tensor in tensors:
            th._dynamo.mark_dynamic(tensor, 1)
        # One thread, because a forked process would wait for the other threads forever. No precompiled headers, because they
        # take longer than they save for a single file. Guards on tensors only, because nothing else changes between calls
        options: dict[str, Any] = {
            "cpp_wrapper": True,
            "cpp.threads": 1,
            "cpp_cache_precompile_headers": False,
            "guard_filter_fn": th.compiler.keep_tensor_guards_unsafe,
        }
        compiled = th.compile(own_step, fullgraph=True, options=options)
        # The first call compiles. torch's deprecation warnings about its own compiler do not concern users
        with th.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
            compiled(*tensors)
        return compiled


#: Shared by all simulators, because value targets create a simulator in each update. It keeps the functions of a few vehicles
compiled_tracking = functools.lru_cache(maxsize=16)(CompiledTracking)


def tracking(
    states: dynamics.Array,
    path: dynamics.Array,
    controls: dynamics.Array,
    vehicle: VehicleParameters,
    xp: dynamics.ArrayModule,
) -> tuple[TrackingState, tuple[dynamics.Array, dynamics.Array], dynamics.Array]:
    """
    One step of the simulator.

    :param states: tracking errors, ``(6, n)``
    :param path: lateral position and yaw angle of the path at the vehicles, ``(2, n)``
    :param controls: front wheel angle and acceleration, ``(2, n)``
    :param vehicle: parameters of the vehicles
    :param xp: array module
    :return: next tracking errors, the path at the next positions, and rewards, each ``(n,)``
    """
    y_ref, phi_ref = path
    steering, acceleration = controls
    state = TrackingState(*states)
    next_state, next_path = dynamics.tracking_step(
        state, (y_ref, phi_ref), steering, acceleration, vehicle, dynamics.N_SUBSTEPS, "path", xp
    )
    return next_state, next_path, dynamics.tracking_reward(state, steering, acceleration)


def numpy_tracking(
    states: np.ndarray, path: np.ndarray, controls: np.ndarray, vehicle: VehicleParameters
) -> tuple[np.ndarray, ...]:
    """
    One step of the simulator with NumPy.

    :param states: tracking errors, ``(6, n)``
    :param path: lateral position and yaw angle of the path at the vehicles, ``(2, n)``
    :param controls: front wheel angle and acceleration, ``(2, n)``
    :param vehicle: parameters of the vehicles
    :return: next tracking errors, ``(6, n)``, the path at the next positions, ``(2, n)``, and rewards, ``(n,)``, in new arrays
    """
    next_state, next_path, rewards = tracking(states, path, controls, vehicle, np)
    # The same as np.stack(), with less overhead
    return np.concatenate(next_state).reshape(states.shape), np.concatenate(next_path).reshape(path.shape), rewards


class PathTrackingSimulator(BatchSimulator):
    """
    Many vehicles that track one path. :class:`~sb3_mpg_envs.path_tracking.env.PathTrackingEnv` describes the task.

    :param num_agents: number of vehicles
    :param vehicle: parameters of the vehicles
    :param early_reset: end an episode when the vehicle leaves the useful region
    :param early_reset_terminates: report early resets as ``terminated`` instead of ``truncated``
    :param early_reset_penalty: subtracted from the reward of an early reset; only used with ``early_reset_terminates``
    :param start_width: factor on the spreads of the start distribution
    :param compile: compile the equations of motion, see :class:`CompiledTracking`
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
        compile: bool = False,
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
        self.compile = compile

    def _allocate(self, num_agents: int) -> None:
        super()._allocate(num_agents)
        # Lateral position and yaw angle of the path at the vehicles. Kept, because each step needs those of the step before
        self._path = np.full((2, num_agents), np.nan)

    def _write_states(self, states: np.ndarray, columns: Columns) -> None:
        super()._write_states(states, columns)
        self._path[:, columns] = dynamics.path_reference(TrackingState(*states).x, "path", np)

    def prior_model(self) -> PathTrackingModel:
        return PathTrackingModel(vehicle=self.vehicle, **self._termination())

    def _exact_model(self) -> PathTrackingModel:
        return PathTrackingModel.exact(vehicle=self.vehicle, **self._termination())

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

    def _transition(self, states: np.ndarray, controls: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        path = self._path[:, columns]
        if self.compile:
            next_states, self._path[:, columns], rewards = compiled_tracking(self.vehicle)(states, path, controls)
        else:
            next_states, self._path[:, columns], rewards = numpy_tracking(states, path, controls, self.vehicle)
        return next_states, rewards

    def _is_outside(self, states: np.ndarray) -> np.ndarray:
        return dynamics.is_off_path(TrackingState(*states))
