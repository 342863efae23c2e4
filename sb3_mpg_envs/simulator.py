"""One simulator per task, stepping many agents at once, and its adapters to Gymnasium and Stable-Baselines3."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from sb3_mpg.common.models.base import PriorModel

# A start distribution that lies almost entirely in the early-reset region is a mistake, not bad luck
MAX_START_DRAWS = 1000
# Images of more agents than that are too small to be read
MAX_RENDERED_AGENTS = 4

RENDER_MODES = ["human", "rgb_array"]


#: Which agents, as an index of the columns of arrays with one column per agent
Columns = slice | np.ndarray


def columns_of(indices: np.ndarray | None) -> Columns:
    """
    :param indices: which agents; ``None`` for all of them
    :return: the index of their columns
    """
    return slice(None) if indices is None else indices


class Renderer(Protocol):
    """Draws one agent."""

    def render(self, state: np.ndarray, control: np.ndarray) -> np.ndarray | None:
        """
        :param state: state of the agent, ``(S,)``
        :param control: its last control in physical units, ``(A,)``
        :return: the picture, ``(height, width, 3)``, in the mode ``rgb_array``
        """

    def close(self) -> None: ...


class BatchSimulator(ABC):
    """
    A task: steps many agents at once, in NumPy and in double precision.

    A simulator knows nothing about time limits and never resets an agent by itself; that is the job of its adapters
    :class:`SimulatorEnv`, :class:`SimulatorVectorEnv` and :class:`SimulatorVecEnv`. The state is the observation in double
    precision, so that :meth:`set_state` can put an agent wherever an observation describes.

    Actions are between -1 and 1; multiplied by the ranges of the actuators they are the *controls*, in physical units.

    A subclass writes :meth:`_start_states`, :meth:`_transition`, :meth:`_is_outside`, :meth:`prior_model` and
    :meth:`make_renderer`, and :meth:`_exact_model` if it can. There, arrays have one row per dimension and one column per
    agent.

    :param num_agents: number of agents that are stepped together
    :param observation_space: observation space of one agent
    :param max_controls: the control that an action of 1 stands for, for each actuator
    :param early_reset: end an episode when the agent leaves the useful region of the state space
    :param early_reset_terminates: report these ends as ``terminated`` (no value lies behind them) instead of ``truncated``
    :param early_reset_penalty: subtracted from the reward of a step that ends in an early reset; only used when
        ``early_reset_terminates``, because with negative rewards a free way out teaches the agent to take it
    :param start_width: scales the spreads of the start distribution around their centres; 0 starts at the centres
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
        # Not a number until the first reset, so that a forgotten reset is seen
        self._states = np.full((self.observation_space.shape[0], num_agents), np.nan)
        self._controls = np.zeros((self.action_space.shape[0], num_agents))

    def make_simulator(self, num_agents: int) -> "BatchSimulator":
        """
        A fresh, unseeded simulator that shares settings and spaces with this one. What changes while stepping must be made by
        :meth:`_allocate`.

        :param num_agents: its number of agents
        :return: the simulator; reset it before the first step
        """
        # Its settings are shared, and all that changes is allocated anew
        simulator = copy.copy(self)
        simulator._allocate(num_agents)
        return simulator

    def seed(self, seed: int | None = None) -> None:
        """
        Seed the start distribution.

        :param seed: the seed; ``None`` draws one from the operating system
        """
        self.np_random = np.random.default_rng(seed)

    @property
    def last_controls(self) -> np.ndarray:
        """Controls of the last step in physical units, zero for agents that were reset since, ``(num_agents, A)``."""
        return self._controls.T.copy()

    def get_state(self) -> np.ndarray:
        """
        The states of all agents: their observations in double precision.

        :return: states, ``(num_agents, O)``, float64; :meth:`set_state` accepts them
        """
        return self._states.T.copy()

    def set_state(self, observations: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
        """
        Put agents into the states that observations describe.

        :param observations: observations or states, ``(num_agents, O)``, or ``(len(indices), O)``
        :param indices: which agents to move; ``None`` moves all of them
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

        :param indices: which agents to reset; ``None`` resets all of them
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
        Step agents once. Nobody is reset.

        :param actions: actions of the agents that are stepped, ``(n, A)``; clipped to [-1, 1]
        :param indices: which agents to step, each once; ``None`` steps all of them
        :return: of the agents that were stepped: observations ``(n, O)`` float32, rewards ``(n,)`` float64,
            terminated ``(n,)`` bool, truncated ``(n,)`` bool; the flags tell of early resets only
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
        # Not np.clip: its overhead is several times that of the two functions
        controls = self._max_controls * np.minimum(np.maximum(actions, -1.0), 1.0)

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

    @staticmethod
    def _observations(states: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(states.T, dtype=np.float32)

    def _canonical_states(self, states: np.ndarray) -> np.ndarray:
        """
        Bring states that a user gives into the range that :meth:`_transition` produces. By default, nothing to do.

        :param states: states, ``(S, n)``
        :return: states, ``(S, n)``
        """
        return states

    @abstractmethod
    def _start_states(self, n_starts: int) -> np.ndarray:
        """
        Draw from the start distribution, early resets disregarded.

        :param n_starts: number of start states
        :return: states, ``(S, n_starts)``
        """

    @abstractmethod
    def _transition(self, states: np.ndarray, controls: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """
        :param states: states, ``(S, n)``
        :param controls: controls in physical units, ``(A, n)``
        :param columns: which agents they belong to
        :return: next states, ``(S, n)``, and the rewards of the step, ``(n,)``, in new arrays
        """

    @abstractmethod
    def _is_outside(self, states: np.ndarray) -> np.ndarray:
        """
        :param states: states, ``(S, n)``
        :return: whether they lie outside of the useful region, ``(n,)``
        """

    @abstractmethod
    def prior_model(self) -> PriorModel:
        """The paper's rough model of this task, with the parameters of this simulator."""

    def exact_model(self) -> PriorModel | None:
        """
        :return: a new model that agrees with this simulator step by step, ``None`` where there is none: also of a subclass
            that changes what a step does, unless it writes :meth:`_exact_model` too
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
        :return: what models are told of where episodes terminate, and at what cost
        """
        terminates = self.early_reset and self.early_reset_terminates
        return {"terminates": terminates, "early_reset_penalty": self.early_reset_penalty if terminates else 0.0}

    @abstractmethod
    def make_renderer(self, render_mode: str) -> Renderer:
        """
        :param render_mode: ``human`` or ``rgb_array``
        :return: a renderer for one agent of this simulator
        """


def _check_render_mode(simulator: BatchSimulator, render_mode: str | None) -> None:
    render_modes = simulator.metadata["render_modes"]
    if render_mode is not None and render_mode not in render_modes:
        raise ValueError(f"render_mode must be None or one of {render_modes}, got {render_mode!r}")


def _check_max_episode_steps(max_episode_steps: int | None) -> int | None:
    # Gymnasium writes "no time limit" as -1 in make() and as None in the specification
    if max_episode_steps is None or max_episode_steps == -1:
        return None
    if max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be at least 1, or None for no time limit, got {max_episode_steps}")
    return max_episode_steps


class _AgentRenderers:
    """Renderers of the first agents, made when the first picture is asked for."""

    def __init__(self, simulator: BatchSimulator, render_mode: str, max_agents: int):
        n_agents = min(simulator.num_agents, max_agents)
        self.simulator = simulator
        self.renderers = [simulator.make_renderer(render_mode) for _ in range(n_agents)]

    def render(self) -> list[np.ndarray | None]:
        states, controls = self.simulator.get_state(), self.simulator.last_controls
        return [renderer.render(states[idx], controls[idx]) for idx, renderer in enumerate(self.renderers)]

    def close(self) -> None:
        for renderer in self.renderers:
            renderer.close()


class _SimulatorAdapter:
    """What all adapters of a simulator offer."""

    simulator: BatchSimulator
    _renderers: _AgentRenderers | None

    def prior_model(self) -> PriorModel:
        """The paper's rough model of this task, with the parameters of this environment."""
        return self.simulator.prior_model()

    def make_simulator(self, num_agents: int) -> BatchSimulator:
        """
        A fresh simulator with the settings of this environment.

        :param num_agents: its number of agents
        :return: the simulator
        """
        return self.simulator.make_simulator(num_agents)

    def _close_renderers(self) -> None:
        if self._renderers is not None:
            self._renderers.close()
            self._renderers = None


class SimulatorEnv(_SimulatorAdapter, gym.Env[np.ndarray, np.ndarray]):
    """
    A simulator of one agent as a Gymnasium environment.

    ``reset(options={"state": observation})`` starts in the state that an observation describes.

    :param simulator: simulator with one agent
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    """

    def __init__(self, simulator: BatchSimulator, render_mode: str | None = None):
        if simulator.num_agents != 1:
            raise ValueError(f"SimulatorEnv is for simulators of one agent, got num_agents={simulator.num_agents}")
        _check_render_mode(simulator, render_mode)
        self.simulator = simulator
        self.observation_space = simulator.observation_space
        self.action_space = simulator.action_space
        self.render_mode = render_mode
        self._renderers: _AgentRenderers | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        # One generator for both, so that whoever looks at np_random sees what is drawn from
        self.simulator.np_random = self.np_random
        if options is not None and "state" in options:
            observation = self.simulator.set_state(np.asarray(options["state"])[np.newaxis])[0]
        else:
            observation = self.simulator.reset()[0]
        if self.render_mode == "human":
            self.render()
        return observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observations, rewards, terminated, truncated = self.simulator.step(np.asarray(action)[np.newaxis])
        if self.render_mode == "human":
            self.render()
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            gym.logger.warn(
                "render() needs a render mode: pass render_mode='human' or 'rgb_array' when making the environment"
            )
            return None
        if self._renderers is None:
            self._renderers = _AgentRenderers(self.simulator, self.render_mode, max_agents=1)
        return self._renderers.render()[0]

    def close(self) -> None:
        self._close_renderers()


class SimulatorVectorEnv(_SimulatorAdapter, gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """
    A simulator as a Gymnasium vector environment; ``gymnasium.make_vec`` uses it.

    An agent whose episode ended is reset by its next step, which ignores its action and returns a reward of zero.

    :param simulator: the simulator
    :param max_episode_steps: time limit; ``None`` for none (``make_vec`` passes the registered one)
    :param render_mode: ``None``, ``human`` or ``rgb_array``; only the first agents are drawn
    """

    def __init__(
        self,
        simulator: BatchSimulator,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ):
        _check_render_mode(simulator, render_mode)
        self.simulator = simulator
        self.num_envs = simulator.num_agents
        self.max_episode_steps = _check_max_episode_steps(max_episode_steps)
        self.render_mode = render_mode
        self.metadata = {**simulator.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = simulator.observation_space
        self.single_action_space = simulator.action_space
        self.observation_space = batch_space(simulator.observation_space, self.num_envs)
        self.action_space = batch_space(simulator.action_space, self.num_envs)
        self._episode_lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._needs_reset = np.zeros(self.num_envs, dtype=bool)
        self._renderers: _AgentRenderers | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.simulator.np_random = self.np_random
        if options is not None and "state" in options:
            observations = self.simulator.set_state(options["state"])
        else:
            observations = self.simulator.reset()
        self._episode_lengths[:] = 0
        self._needs_reset[:] = False
        return observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        observations, rewards, terminated, truncated = self.simulator.step(actions)
        self._episode_lengths += 1
        if self.max_episode_steps is not None:
            truncated = truncated | (self._episode_lengths >= self.max_episode_steps)

        # The agents whose episode ended one step ago start anew instead
        indices = np.flatnonzero(self._needs_reset)
        if len(indices) > 0:
            observations = self.simulator.reset(indices)
            rewards[indices] = 0.0
            terminated[indices] = False
            truncated[indices] = False
            self._episode_lengths[indices] = 0
        self._needs_reset = terminated | truncated
        return observations, rewards, terminated, truncated, {}

    def render(self) -> tuple[np.ndarray | None, ...] | None:  # type: ignore[override]
        if self.render_mode is None:
            gym.logger.warn(
                "render() needs a render mode: pass render_mode='human' or 'rgb_array' when making the environment"
            )
            return None
        if self._renderers is None:
            max_agents = 1 if self.render_mode == "human" else MAX_RENDERED_AGENTS
            self._renderers = _AgentRenderers(self.simulator, self.render_mode, max_agents)
        return tuple(self._renderers.render())

    def close_extras(self, **kwargs: Any) -> None:
        self._close_renderers()


class SimulatorVecEnv(_SimulatorAdapter, VecEnv):
    """
    A simulator as a Stable-Baselines3 vector environment: hundreds of agents in one process.

    Episodes are reset in the step that ends them, as in ``DummyVecEnv``. The infos of an ended episode hold
    ``terminal_observation``, ``TimeLimit.truncated`` and, as if wrapped in a ``Monitor``, ``episode``.

    Settings belong to all agents: :meth:`set_attr` cannot change those of a few.

    :param simulator: the simulator
    :param max_episode_steps: time limit; ``None`` for none
    :param render_mode: ``None``, ``human`` or ``rgb_array``; only the first agents are drawn
    """

    actions: np.ndarray

    def __init__(
        self,
        simulator: BatchSimulator,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ):
        _check_render_mode(simulator, render_mode)
        self.simulator = simulator
        self.render_mode = render_mode
        self.max_episode_steps = _check_max_episode_steps(max_episode_steps)
        super().__init__(simulator.num_agents, simulator.observation_space, simulator.action_space)
        self.metadata = dict(simulator.metadata)
        self._episode_returns = np.zeros(self.num_envs)
        self._episode_lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._start_time = time.time()
        self._renderers: _AgentRenderers | None = None

    def reset(self) -> np.ndarray:
        # All agents draw from one generator, so one seed is enough
        if self._seeds[0] is not None:
            self.simulator.seed(self._seeds[0])
        observations = self.simulator.reset()
        indices = np.array([idx for idx, options in enumerate(self._options) if "state" in options], dtype=int)
        if len(indices) > 0:
            observations = self.simulator.set_state(np.stack([self._options[idx]["state"] for idx in indices]), indices)
        self._episode_returns[:] = 0.0
        self._episode_lengths[:] = 0
        self.reset_infos = [{} for _ in range(self.num_envs)]
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, terminated, truncated = self.simulator.step(self.actions)
        self._episode_returns += rewards
        self._episode_lengths += 1
        if self.max_episode_steps is not None:
            truncated = truncated | (self._episode_lengths >= self.max_episode_steps)
        dones = terminated | truncated

        # Wrappers write into the infos: every agent needs its own
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        indices = np.flatnonzero(dones)
        if len(indices) > 0:
            elapsed_time = round(time.time() - self._start_time, 6)
            # Python numbers, converted all at once
            is_truncated = (truncated & ~terminated)[indices].tolist()
            returns = self._episode_returns[indices].round(6).tolist()
            lengths = self._episode_lengths[indices].tolist()
            for place, idx in enumerate(indices.tolist()):
                infos[idx] = {
                    "terminal_observation": observations[idx],
                    "TimeLimit.truncated": is_truncated[place],
                    "episode": {"r": returns[place], "l": lengths[place], "t": elapsed_time},
                }
            self._episode_returns[indices] = 0.0
            self._episode_lengths[indices] = 0
            observations = self.simulator.reset(indices)
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        self._close_renderers()

    def _render_agents(self) -> list[np.ndarray | None]:
        if self._renderers is None:
            assert self.render_mode is not None
            max_agents = 1 if self.render_mode == "human" else MAX_RENDERED_AGENTS
            self._renderers = _AgentRenderers(self.simulator, self.render_mode, max_agents)
        return self._renderers.render()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Pictures of the first agents."""
        if self.render_mode != "rgb_array":
            raise ValueError(f"Images need render_mode='rgb_array', got {self.render_mode!r}")
        return self._render_agents()

    def render(self, mode: str | None = None) -> np.ndarray | None:
        if self.render_mode == "human" and mode in (None, "human"):
            self._render_agents()
            return None
        return super().render(mode)

    def _owner_of(self, attr_name: str) -> Any:
        # What describes the task lives in the simulator, what describes the episodes lives here
        return self if hasattr(self, attr_name) else self.simulator

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        value = getattr(self._owner_of(attr_name), attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"All agents share one simulator: {attr_name} can only be set for all of them (indices=None)")
        setattr(self._owner_of(attr_name), attr_name, value)

    def env_method(self, method_name: str, *method_args, indices: VecEnvIndices = None, **method_kwargs) -> list[Any]:
        method = getattr(self._owner_of(method_name), method_name)
        return [method(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        # The infos hold what a Monitor would write: say so, or evaluate_policy warns and ignores them
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]
