"""The adapters of a simulator to Gymnasium's environments and vector environments and to Stable-Baselines3's ``VecEnv``."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg_envs.simulator import BatchSimulator, Renderer

# More images side by side are too small to be read
MAX_RENDERED_AGENTS = 4

#: A number of steps, ``None`` for no limit, or the limit that the environment is registered with
TimeLimit = int | None | Literal["registered"]


class SimulatorAdapter:
    """
    The common part of all adapters.

    :param simulator: the simulator
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    """

    def __init__(self, simulator: BatchSimulator, render_mode: str | None):
        render_modes = simulator.metadata["render_modes"]
        if render_mode is not None and render_mode not in render_modes:
            raise ValueError(f"render_mode must be None or one of {render_modes}, got {render_mode!r}")
        self.simulator = simulator
        self.render_mode = render_mode
        # Created with the first image
        self._renderers: list[Renderer] = []

    def prior_model(self) -> PriorModel:
        """
        :return: the paper's rough model of this task, with the parameters of this environment
        """
        return self.simulator.prior_model()

    def make_simulator(self, num_agents: int) -> BatchSimulator:
        """
        Make a new simulator with the settings of this environment.

        :param num_agents: number of agents of the new simulator
        :return: the simulator; reset it before the first step
        """
        return self.simulator.make_simulator(num_agents)

    def _render_agents(self) -> list[np.ndarray | None]:
        """
        Draw the first agents: one in a window, up to four as images.

        :return: an image per drawn agent, ``None`` in render mode ``human``; empty without a render mode
        """
        if self.render_mode is None:
            gym.logger.warn(
                "render() needs a render mode: pass render_mode='human' or 'rgb_array' when making the environment"
            )
            return []
        self.simulator.check_reset()
        if not self._renderers:
            n_rendered = min(self.simulator.num_agents, 1 if self.render_mode == "human" else MAX_RENDERED_AGENTS)
            self._renderers = [self.simulator.make_renderer(self.render_mode) for _ in range(n_rendered)]
        states, controls = self.simulator.get_state(), self.simulator.last_controls
        return [renderer.render(states[idx], controls[idx]) for idx, renderer in enumerate(self._renderers)]

    def _close_renderers(self) -> None:
        for renderer in self._renderers:
            renderer.close()
        self._renderers = []


class SimulatorEnv(SimulatorAdapter, gym.Env[np.ndarray, np.ndarray]):
    """
    A simulator of one agent as a Gymnasium environment.

    ``reset(options={"state": observation})`` starts in the state of the given observation.

    :param simulator: a simulator with one agent
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    """

    def __init__(self, simulator: BatchSimulator, render_mode: str | None = None):
        if simulator.num_agents != 1:
            raise ValueError(f"SimulatorEnv is for simulators of one agent, got num_agents={simulator.num_agents}")
        super().__init__(simulator, render_mode)
        self.observation_space = simulator.observation_space
        self.action_space = simulator.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        # The simulator draws from the generator that users see as `env.np_random`
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
        images = self._render_agents()
        return images[0] if images else None

    def close(self) -> None:
        self._close_renderers()


class BatchAdapter(SimulatorAdapter):
    """
    The common part of both vector environments: the simulator of a task, its time limit and the lengths of the episodes.

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none
    :param render_mode: ``None``, ``human`` or ``rgb_array``
    :param simulator_kwargs: arguments of the simulator
    """

    #: Id of the environment, for its registered time limit
    env_id: ClassVar[str]
    simulator_class: ClassVar[type[BatchSimulator]]

    def __init__(
        self,
        num_envs: int,
        max_episode_steps: TimeLimit = "registered",
        render_mode: str | None = None,
        **simulator_kwargs: Any,
    ):
        super().__init__(self.simulator_class(num_envs, **simulator_kwargs), render_mode)
        if max_episode_steps == "registered":
            max_episode_steps = gym.spec(self.env_id).max_episode_steps
        # Gymnasium writes "no time limit" as -1 in make() and as None in the specification
        if max_episode_steps == -1:
            max_episode_steps = None
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, or None for no time limit, got {max_episode_steps}")
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self._episode_lengths = np.zeros(num_envs, dtype=np.int64)

    def _step_agents(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        Step all agents and apply the time limit.

        :param actions: actions, ``(num_envs, A)``
        :return: observations ``(num_envs, O)``, rewards, terminated and truncated, each ``(num_envs,)``
        """
        observations, rewards, terminated, truncated = self.simulator.step(actions)
        self._episode_lengths += 1
        if self.max_episode_steps is not None:
            truncated = truncated | (self._episode_lengths >= self.max_episode_steps)
        return observations, rewards, terminated, truncated


class SimulatorVectorEnv(BatchAdapter, gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """
    A simulator as a Gymnasium vector environment, which ``gymnasium.make_vec`` returns.

    The step after the end of an episode resets the agent: it ignores the action and returns a reward of zero
    (``AutoresetMode.NEXT_STEP``).

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none. The default is the registered one.
    :param render_mode: ``None``, ``human`` or ``rgb_array``; only the first agents are drawn
    :param simulator_kwargs: arguments of the simulator
    """

    def __init__(
        self,
        num_envs: int,
        max_episode_steps: TimeLimit = "registered",
        render_mode: str | None = None,
        **simulator_kwargs: Any,
    ):
        super().__init__(num_envs, max_episode_steps, render_mode, **simulator_kwargs)
        self.metadata = {**self.simulator.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = self.simulator.observation_space
        self.single_action_space = self.simulator.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._needs_reset = np.zeros(num_envs, dtype=bool)

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
        observations, rewards, terminated, truncated = self._step_agents(actions)
        # Agents whose episode ended with the previous step are reset
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
        images = self._render_agents()
        return tuple(images) if images else None

    def close_extras(self, **kwargs: Any) -> None:
        self._close_renderers()


class SimulatorVecEnv(BatchAdapter, VecEnv):
    """
    A simulator as a Stable-Baselines3 ``VecEnv``: hundreds of agents in one process.

    As in ``DummyVecEnv``, the step that ends an episode also resets the agent. The info of that step has the keys
    ``terminal_observation``, ``TimeLimit.truncated`` and, as from a ``Monitor``, ``episode``.

    All agents share one simulator. Therefore :meth:`set_attr` can only change settings of all agents together.

    :param num_envs: number of agents
    :param max_episode_steps: time limit; ``None`` for none. The default is the registered one.
    :param render_mode: ``None``, ``human`` or ``rgb_array``; only the first agents are drawn
    :param simulator_kwargs: arguments of the simulator
    """

    actions: np.ndarray

    def __init__(
        self,
        num_envs: int,
        max_episode_steps: TimeLimit = "registered",
        render_mode: str | None = None,
        **simulator_kwargs: Any,
    ):
        BatchAdapter.__init__(self, num_envs, max_episode_steps, render_mode, **simulator_kwargs)
        VecEnv.__init__(self, num_envs, self.simulator.observation_space, self.simulator.action_space)
        self.metadata = dict(self.simulator.metadata)
        self._episode_returns = np.zeros(num_envs)
        self._start_time = time.time()

    def reset(self) -> np.ndarray:
        # All agents draw from one generator: the first seed is enough
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
        observations, rewards, terminated, truncated = self._step_agents(self.actions)
        self._episode_returns += rewards
        dones = terminated | truncated

        # Wrappers write into the infos, so each agent needs its own
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        indices = np.flatnonzero(dones)
        if len(indices) > 0:
            elapsed_time = round(time.time() - self._start_time, 6)
            # One conversion to Python numbers for all agents is faster than one for each
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

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        :return: images of the first agents, each ``(height, width, 3)``
        """
        if self.render_mode != "rgb_array":
            raise ValueError(f"Images need render_mode='rgb_array', got {self.render_mode!r}")
        return self._render_agents()

    def render(self, mode: str | None = None) -> np.ndarray | None:
        if self.render_mode == "human" and mode in (None, "human"):
            self._render_agents()
            return None
        return super().render(mode)

    def _owner_of(self, attr_name: str) -> Any:
        # The simulator has the settings of the task, the adapter those of the episodes
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
        # The infos have the keys of a Monitor; without one, evaluate_policy would warn and ignore them
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]
