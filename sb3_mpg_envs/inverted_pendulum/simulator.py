"""Simulator of the inverted pendulum task."""

from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium import spaces
from mujoco.rollout import Rollout

from sb3_mpg_envs.inverted_pendulum import dynamics
from sb3_mpg_envs.inverted_pendulum.dynamics import PAPER_PENDULUM, PendulumParameters, PendulumState
from sb3_mpg_envs.inverted_pendulum.model import InvertedPendulumModel
from sb3_mpg_envs.simulator import RENDER_MODES, UNBOUNDED, BatchSimulator, Columns, Renderer

CONTROL_SPEC = int(mujoco.mjtState.mjSTATE_CTRL.value)


class InvertedPendulumSimulator(BatchSimulator):
    """
    Many cart-poles, stepped by MuJoCo. :class:`~sb3_mpg_envs.inverted_pendulum.env.InvertedPendulumContiEnv` describes the
    task.

    :param num_agents: number of cart-poles
    :param parameters: parameters of the cart and its pole
    :param early_reset: end an episode when the pole falls or the cart is too far away
    :param early_reset_terminates: report early resets as ``terminated`` instead of ``truncated``
    :param early_reset_penalty: subtracted from the reward of an early reset; only used with ``early_reset_terminates``
    :param start_width: factor on the spread of the start distribution
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": RENDER_MODES, "render_fps": 25}

    def __init__(
        self,
        num_agents: int,
        *,
        parameters: PendulumParameters = PAPER_PENDULUM,
        early_reset: bool = True,
        early_reset_terminates: bool = False,
        early_reset_penalty: float = 50.0,
        start_width: float = 1.0,
    ):
        self.parameters = parameters
        self._make_mujoco()
        super().__init__(
            num_agents,
            spaces.Box(-UNBOUNDED, UNBOUNDED, (4,), dtype=np.float32),
            (dynamics.MAX_CONTROL,),
            early_reset=early_reset,
            early_reset_terminates=early_reset_terminates,
            early_reset_penalty=early_reset_penalty,
            start_width=start_width,
        )

    def _make_mujoco(self) -> None:
        self.mujoco_model = mujoco.MjModel.from_xml_string(dynamics.mujoco_xml(self.parameters))
        self._mujoco_data = [mujoco.MjData(self.mujoco_model)]
        # No thread pool: the calling thread steps all agents
        self._rollout = Rollout(nthread=0)

    def _allocate(self, num_agents: int) -> None:
        super()._allocate(num_agents)
        # MuJoCo's state is: time (not used), position, angle, velocity, angular velocity
        self._initial_states = np.zeros((num_agents, 5))
        self._trajectories = np.zeros((num_agents, dynamics.FRAME_SKIP, 5))
        self._held_controls = np.zeros((num_agents, dynamics.FRAME_SKIP, 1))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("mujoco_model", "_mujoco_data", "_rollout"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # MuJoCo's Rollout cannot be pickled, so all MuJoCo objects are created again
        self.__dict__.update(state)
        self._make_mujoco()

    def prior_model(self) -> InvertedPendulumModel:
        return InvertedPendulumModel(parameters=self.parameters, **self._termination())

    def _exact_model(self) -> InvertedPendulumModel:
        return InvertedPendulumModel.exact(parameters=self.parameters, **self._termination())

    def make_renderer(self, render_mode: str) -> Renderer:
        from sb3_mpg_envs.inverted_pendulum.rendering import InvertedPendulumRenderer

        return InvertedPendulumRenderer(render_mode, self.mujoco_model)

    def _start_states(self, n_starts: int) -> np.ndarray:
        half_width = self.start_width * dynamics.START_HALF_WIDTH
        return half_width * self.np_random.uniform(-1, 1, (4, n_starts))

    def _transition(self, states: np.ndarray, controls: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        n_stepped = states.shape[1]
        initial_states, trajectories = self._initial_states[:n_stepped], self._trajectories[:n_stepped]
        held_controls = self._held_controls[:n_stepped]
        initial_states[:, 1:] = states.T
        held_controls[:, :, 0] = controls.T
        # One call steps all agents. With checks, MuJoCo would allocate new outputs
        self._rollout.rollout(
            [self.mujoco_model] * n_stepped,
            self._mujoco_data,
            initial_states,
            held_controls,
            control_spec=CONTROL_SPEC,
            skip_checks=True,
            nstep=dynamics.FRAME_SKIP,
            state=trajectories,
        )
        next_states = np.ascontiguousarray(trajectories[:, -1, 1:].T)
        return next_states, dynamics.pendulum_reward(PendulumState(*next_states), dynamics.REWARD_WEIGHTS)

    def _is_outside(self, states: np.ndarray) -> np.ndarray:
        return dynamics.is_fallen(PendulumState(*states))
