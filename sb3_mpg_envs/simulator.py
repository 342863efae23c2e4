"""The base class of the simulators. Each task has one, and it steps many agents at once."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from sb3_mpg.common.models.base import PriorModel

# More rejected draws than this mean that the start distribution is wrong, not unlucky
MAX_START_DRAWS = 1000
# Bound of unbounded observations: the environment checkers warn about infinite bounds
UNBOUNDED = 1e6
RENDER_MODES = ["human", "rgb_array"]

#: Selects agents: an index into the columns of arrays with one column per agent
Columns = slice | np.ndarray


def columns_of(indices: np.ndarray | None) -> Columns:
    """
    :param indices: indices of the selected agents; ``None`` selects all agents
    :return: index of their columns
    """
    return slice(None) if indices is None else indices


class Renderer(Protocol):
    """Draws one agent."""

    def render(self, state: np.ndarray, control: np.ndarray) -> np.ndarray | None:
        """
        :param state: state of the agent, ``(S,)``
        :param control: last control of the agent in physical units, ``(A,)``
        :return: image, ``(height, width, 3)``, in render mode ``rgb_array``; otherwise ``None``
        """

    def close(self) -> None:
        """Close the window, if there is one."""


class BatchSimulator(ABC):
    """
    A task. A simulator steps many agents at once, with NumPy and in double precision.

    A simulator has no time limit and never resets an agent by itself. The adapters do both:
    :class:`~sb3_mpg_envs.adapters.SimulatorEnv`, :class:`~sb3_mpg_envs.adapters.SimulatorVectorEnv` and
    :class:`~sb3_mpg_envs.adapters.SimulatorVecEnv`.

    The state is the observation in double precision. Therefore :meth:`set_state` accepts observations.

    Actions are between -1 and 1. The simulator multiplies them by the ranges of the actuators; the results are the
    *controls*, in physical units.

    Subclasses implement :meth:`_start_states`, :meth:`_transition`, :meth:`_is_outside`, :meth:`prior_model` and
    :meth:`make_renderer`, and, where an exact model exists, :meth:`_exact_model`. The arrays of these methods have one row
    per dimension and one column per agent.

    :param num_agents: number of agents that are stepped together
    :param observation_space: observation space of one agent
    :param max_controls: control that corresponds to an action of 1, for each actuator
    :param early_reset: end an episode when the agent leaves the useful region of the state space
    :param early_reset_terminates: report early resets as ``terminated`` (the value after the episode is zero) instead of
        ``truncated`` (the value is bootstrapped)
    :param early_reset_penalty: subtracted from the reward of a step that ends in an early reset. It is only used with
        ``early_reset_terminates``: where all rewards are negative, a termination without a penalty rewards the agent for
        ending the episode.
    :param start_width: factor on the spreads of the start distribution; 0 always starts at its centre
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": RENDER_MODES, "render_fps": 10}

    def __init__(
        self,
        num_agents: int,
        observation_space: spaces.Box,
        max_controls: Sequence[float],
        *,
        early_reset: bool = True,
        early_reset_terminates: bool = False,
        early_reset_penalty: float = 0.0,
        start_width: float = 1.0,
    ):
        if not (np.isfinite(start_width) and start_width >= 0):
            raise ValueError(f"start_width must be a finite number >= 0, got {start_width}")
        if not (np.isfinite(early_reset_penalty) and early_reset_penalty >= 0):
            raise ValueError(f"early_reset_penalty must be a finite number >= 0, got {early_reset_penalty}")
        self.observation_space = observation_space
        self.action_space = spaces.Box(-1.0, 1.0, (len(max_controls),), dtype=np.float32)
        self.early_reset = early_reset
        self.early_reset_terminates = early_reset_terminates
        self.early_reset_penalty = early_reset_penalty
        self.start_width = start_width
        # (A, 1)
        self._max_controls = np.array(max_controls, dtype=np.float64)[:, np.newaxis]
        self._allocate(num_agents)

    def _allocate(self, num_agents: int) -> None:
        if num_agents < 1:
            raise ValueError(f"num_agents must be at least 1, got {num_agents}")
        self.num_agents = num_agents
        self.np_random = np.random.default_rng()
        # Which agents have no state, ``None`` as soon as all have one
        self._is_stateless: np.ndarray | None = np.ones(num_agents, dtype=bool)
        self._states = np.full((self.observation_space.shape[0], num_agents), np.nan)
        self._controls = np.zeros((self.action_space.shape[0], num_agents))

    def make_simulator(self, num_agents: int) -> "BatchSimulator":
        """
        Make a new, unseeded simulator that shares the settings and spaces of this one. Subclasses must create everything that
        a step changes in :meth:`_allocate`.

        :param num_agents: number of agents of the new simulator
        :return: the simulator; reset it before the first step
        """
        simulator = copy.copy(self)
        simulator._allocate(num_agents)
        return simulator

    def seed(self, seed: int | None = None) -> None:
        """
        Seed the start distribution.

        :param seed: seed; ``None`` takes one from the operating system
        """
        self.np_random = np.random.default_rng(seed)

    def check_reset(self, columns: Columns = slice(None)) -> None:
        """
        :param columns: the agents that are about to be used
        :raises ResetNeeded: when one of them has no state yet
        """
        if self._is_stateless is not None and self._is_stateless[columns].any():
            raise ResetNeeded("There is no state yet: call reset() before the first step() or render().")

    @property
    def last_controls(self) -> np.ndarray:
        """
        Controls of the last step in physical units, ``(num_agents, A)``. They are zero for agents that were reset after it.
        """
        return self._controls.T.copy()

    def get_state(self) -> np.ndarray:
        """
        :return: states of all agents, their observations in double precision, ``(num_agents, O)``
        """
        return self._states.T.copy()

    def set_state(self, observations: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
        """
        Put agents into given states.

        :param observations: observations, or states from :meth:`get_state`, ``(num_agents, O)`` or ``(len(indices), O)``
        :param indices: indices of the agents to move; ``None`` moves all agents
        :return: observations of all agents, ``(num_agents, O)``, float32
        """
        states = np.array(observations, dtype=np.float64)
        n_moved = self.num_agents if indices is None else len(indices)
        expected_shape = (n_moved, self._states.shape[0])
        if states.shape != expected_shape:
            raise ValueError(f"Expected observations of shape {expected_shape}, got {states.shape}")
        if not np.isfinite(states).all():
            raise ValueError("Cannot set a state from observations that are not finite")
        self._write_states(self._canonical_states(states.T), columns_of(indices))
        return self._observations(self._states)

    def reset(self, indices: np.ndarray | None = None) -> np.ndarray:
        """
        Draw new start states.

        :param indices: indices of the agents to reset; ``None`` resets all agents
        :return: observations of all agents, ``(num_agents, O)``, float32
        """
        states = self._start_states(self.num_agents if indices is None else len(indices))
        if self.early_reset:
            for _ in range(MAX_START_DRAWS):
                rejected = np.flatnonzero(self._is_outside(states))
                if len(rejected) == 0:
                    break
                states[:, rejected] = self._start_states(len(rejected))
            else:
                raise ValueError(f"start_width={self.start_width} starts (almost) all agents in the early-reset region")
        self._write_states(states, columns_of(indices))
        return self._observations(self._states)

    def step(
        self, actions: np.ndarray, indices: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        Step agents once, without resetting any.

        :param actions: actions of the stepped agents, ``(n, A)``; they are clipped to [-1, 1]
        :param indices: indices of the agents to step, without repetition; ``None`` steps all agents
        :return: observations ``(n, O)`` float32, rewards ``(n,)`` float64, terminated ``(n,)`` bool and truncated ``(n,)``
            bool of the stepped agents. The two flags report early resets only.
        :raises ResetNeeded: when an agent has no state yet
        """
        n_stepped = self.num_agents if indices is None else len(indices)
        columns = columns_of(indices)
        expected_shape = (n_stepped, self._controls.shape[0])
        actions = np.asarray(actions)
        if actions.shape != expected_shape:
            raise ValueError(f"Expected actions of shape {expected_shape}, got {actions.shape}")
        actions = np.array(actions.T, dtype=np.float64, order="C")
        if not np.isfinite(actions).all():
            raise ValueError("The actions are not finite")
        # np.clip has several times the overhead of these two functions
        controls = self._max_controls * np.minimum(np.maximum(actions, -1.0), 1.0)

        self.check_reset(columns)
        states = self._states[:, columns]
        next_states, rewards = self._transition(states, controls, columns)
        self._states[:, columns] = next_states
        self._controls[:, columns] = controls

        terminated = np.zeros(n_stepped, dtype=bool)
        truncated = np.zeros(n_stepped, dtype=bool)
        if self.early_reset:
            is_outside = self._is_outside(next_states)
            if self.early_reset_terminates:
                terminated = is_outside
                rewards = rewards - self.early_reset_penalty * is_outside
            else:
                truncated = is_outside
        return self._observations(next_states), rewards, terminated, truncated

    def _write_states(self, states: np.ndarray, columns: Columns) -> None:
        self._states[:, columns] = states
        self._controls[:, columns] = 0.0
        if self._is_stateless is not None:
            self._is_stateless[columns] = False
            if not self._is_stateless.any():
                self._is_stateless = None

    @staticmethod
    def _observations(states: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(states.T, dtype=np.float32)

    def _canonical_states(self, states: np.ndarray) -> np.ndarray:
        """
        Bring states given by a user into the range of the states that :meth:`_transition` produces. The default returns them
        unchanged.

        :param states: states, ``(S, n)``
        :return: states, ``(S, n)``
        """
        return states

    @abstractmethod
    def _start_states(self, n_starts: int) -> np.ndarray:
        """
        Draw from the start distribution. :meth:`reset` rejects states in the early-reset region.

        :param n_starts: number of start states
        :return: states, ``(S, n_starts)``
        """

    @abstractmethod
    def _transition(self, states: np.ndarray, controls: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """
        One step of the environment.

        :param states: states, ``(S, n)``
        :param controls: controls in physical units, ``(A, n)``
        :param columns: the agents that they belong to
        :return: next states, ``(S, n)``, and rewards, ``(n,)``, in new arrays
        """

    @abstractmethod
    def _is_outside(self, states: np.ndarray) -> np.ndarray:
        """
        :param states: states, ``(S, n)``
        :return: whether they are outside of the useful region, ``(n,)``
        """

    @abstractmethod
    def prior_model(self) -> PriorModel:
        """
        :return: the paper's rough model of this task, with the parameters of this simulator
        """

    def exact_model(self) -> PriorModel | None:
        """
        :return: a new model that agrees with this simulator step by step, or ``None`` if there is none. A subclass that
            overrides a part of the step has none, unless it overrides :meth:`_exact_model` too.
        """

        def owner(name: str) -> type:
            return next(cls for cls in type(self).__mro__ if name in vars(cls))

        parts = ("step", "_transition", "_is_outside", "_canonical_states")
        is_unchanged = all(issubclass(owner("_exact_model"), owner(part)) for part in parts)
        return self._exact_model() if is_unchanged else None

    def _exact_model(self) -> PriorModel | None:
        return None

    def _termination(self) -> dict[str, Any]:
        """
        :return: the arguments of a model that say whether early resets terminate an episode, and their penalty
        """
        terminates = self.early_reset and self.early_reset_terminates
        return {"terminates": terminates, "early_reset_penalty": self.early_reset_penalty if terminates else 0.0}

    @abstractmethod
    def make_renderer(self, render_mode: str) -> Renderer:
        """
        :param render_mode: ``human`` or ``rgb_array``
        :return: a renderer of one agent
        """
