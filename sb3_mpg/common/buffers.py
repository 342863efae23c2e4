"""The recorded transitions that models are fitted to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mpg.common.goals import check_goals
from sb3_mpg.common.models.windows import Transitions, Windows, cut_windows, to_tensor
from sb3_mpg.common.spaces import FlatObservations, shape_of

# Consecutive steps are similar, so steps are held out in blocks
HELD_OUT_BLOCK = 20
# One of this many blocks is held out
HELD_OUT_EVERY = 10
# Largest number of attempts to draw enough usable random positions
MAX_DRAWS = 20


class RecordedSteps:
    """
    The single steps of a replay buffer, split into training steps and held-out steps. They are single steps even if the
    samples of the buffer are n-step returns. Steps whose next observation is not in the buffer are excluded. The steps of a
    ``HerReplayBuffer`` get new goals in the same proportion as in its samples, so that models are fitted to these goals.

    :param replay_buffer: the buffer, which is only read
    :param unscale_actions: converts the stored actions in [-1, 1] to the units of the environment
    :param device: device of the transitions
    """

    def __init__(
        self, replay_buffer: ReplayBuffer, unscale_actions: Callable[[th.Tensor], th.Tensor], device: th.device | str
    ):
        self.replay_buffer = replay_buffer
        self.flat = FlatObservations(replay_buffer.observation_space)
        self.unscale_actions = unscale_actions
        self.device = device

    def __len__(self) -> int:
        return self.replay_buffer.size() * self.replay_buffer.n_envs

    @property
    def is_full(self) -> bool:
        """Whether the oldest steps were overwritten."""
        return self.replay_buffer.full

    def observations(self) -> th.Tensor:
        """
        :return: all raw observations, float32, ``(N, O)``
        """
        stored = self.flat.gather(self.replay_buffer.observations, slice(self.replay_buffer.size()))
        return to_tensor(stored.reshape(-1, stored.shape[2]), self.device)

    def latest_observations(self) -> th.Tensor:
        """
        :return: the raw observations of the latest step, float32, ``(n_envs, O)``
        """
        return to_tensor(self.flat.gather(self.replay_buffer.observations, self.replay_buffer.pos - 1), self.device)

    def rewards(self) -> th.Tensor:
        """
        :return: all rewards, float32, ``(n_rows, n_envs)``
        """
        return to_tensor(self.replay_buffer.rewards[: self.replay_buffer.size()], self.device)

    def sample_observations(self, n_samples: int) -> th.Tensor:
        """
        :param n_samples: number of observations
        :return: raw observations of replayed states, sampled as for an update, ``(n_samples, O)``
        """
        return self.flat.flatten(self.replay_buffer.sample(n_samples).observations)

    def _is_usable(self, positions: np.ndarray, envs: np.ndarray, held_out: bool) -> np.ndarray:
        # Shift the blocks between environments, so that some steps are held out early on
        shifts = envs * HELD_OUT_EVERY // self.replay_buffer.n_envs
        is_held_out = (positions // HELD_OUT_BLOCK + shifts) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        usable = is_held_out == held_out
        if self.replay_buffer.optimize_memory_usage:
            # The next observation is that of the next row. After an episode end, that row belongs to another episode. At
            # `pos`, the newest next observation has overwritten the oldest step
            usable &= (self.replay_buffer.dones[positions, envs] == 0) & (positions != self.replay_buffer.pos)
        return usable

    def _relabelled(self, steps: Transitions, positions: np.ndarray, envs: np.ndarray) -> Transitions:
        """
        :param steps: the recorded steps at these positions
        :return: the same; with a ``HerReplayBuffer``, some of those in complete episodes have new goals and their rewards
        """
        buffer = self.replay_buffer
        if not isinstance(buffer, HerReplayBuffer):
            return steps
        rows = np.flatnonzero((np.random.rand(len(positions)) < buffer.her_ratio) & (buffer.ep_length[positions, envs] > 0))
        if len(rows) == 0:
            return steps
        virtual = buffer._get_virtual_samples(positions[rows], envs[rows])
        index = th.as_tensor(rows, device=self.device)
        return Transitions(
            steps.observations.index_copy(0, index, self.flat.flatten(virtual.observations)),
            steps.actions,
            steps.rewards.index_copy(0, index, virtual.rewards.float()),
            steps.next_observations.index_copy(0, index, self.flat.flatten(virtual.next_observations)),
            # Whether the episode would have ended with another goal was not recorded
            steps.terminated.index_fill(0, index, float("nan")),
        )

    def _gather(self, positions: np.ndarray, envs: np.ndarray) -> Transitions:
        buffer = self.replay_buffer
        if buffer.optimize_memory_usage:
            next_observations = self.flat.gather(buffer.observations, (positions + 1) % buffer.buffer_size, envs)
        else:
            next_observations = self.flat.gather(buffer.next_observations, positions, envs)

        return Transitions(
            to_tensor(self.flat.gather(buffer.observations, positions, envs), self.device),
            self.unscale_actions(to_tensor(buffer.actions[positions, envs], self.device)),
            to_tensor(buffer.rewards[positions, envs], self.device).reshape(-1, 1),
            to_tensor(next_observations, self.device),
            to_tensor(self._terminated(positions, envs), self.device).reshape(-1, 1),
        )

    def sample(self, n_samples: int, held_out: bool = False) -> Transitions | None:
        """
        :param n_samples: number of steps, drawn with replacement
        :param held_out: whether to draw held-out steps instead of training steps
        :return: the steps, or ``None`` while there are none
        """
        n_rows = self.replay_buffer.size()
        positions, envs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for _ in range(MAX_DRAWS):
            n_draws = n_samples * (HELD_OUT_EVERY if held_out else 2)
            new_positions = np.random.randint(0, n_rows, size=n_draws)
            new_envs = np.random.randint(0, self.replay_buffer.n_envs, size=n_draws)
            usable = self._is_usable(new_positions, new_envs, held_out)
            positions = np.concatenate([positions, new_positions[usable]])
            envs = np.concatenate([envs, new_envs[usable]])
            if len(positions) >= n_samples:
                positions, envs = positions[:n_samples], envs[:n_samples]
                return self._relabelled(self._gather(positions, envs), positions, envs)
        return None

    def latest(self, n_samples: int) -> Transitions | None:
        """
        :param n_samples: number of steps
        :return: the training steps among the latest steps, or ``None`` if there are none
        """
        buffer = self.replay_buffer
        n_rows = min(-(-n_samples // buffer.n_envs), buffer.size())
        rows = (buffer.pos - 1 - np.arange(n_rows)) % buffer.buffer_size
        positions, envs = (array.ravel() for array in np.meshgrid(rows, np.arange(buffer.n_envs), indexing="ij"))
        usable = self._is_usable(positions, envs, held_out=False)
        positions, envs = positions[usable], envs[usable]
        return self._relabelled(self._gather(positions, envs), positions, envs) if len(positions) > 0 else None

    def _terminated(self, positions: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Flags of :class:`Transitions`: NaN where terminations cannot be distinguished from time limits."""
        buffer = self.replay_buffer
        is_known = (buffer.dones[positions, envs] == 0) | buffer.handle_timeout_termination
        return np.where(is_known, self._has_terminated(positions, envs), np.nan)

    def _has_terminated(self, *positions: Any) -> np.ndarray:
        # Time limits and early resets end an episode without terminating it. A buffer that does not handle timeouts cannot
        # distinguish them from terminations
        buffer = self.replay_buffer
        return (buffer.dones[positions] > 0) & (buffer.timeouts[positions] == 0) & buffer.handle_timeout_termination

    def termination_rate(self) -> float:
        """
        :return: share of the steps that are known to have terminated
        """
        return float(self._has_terminated(slice(self.replay_buffer.size())).mean())

    def n_ends(self) -> int:
        """
        :return: number of training steps that are known to have terminated
        """
        return len(self._places_of_ends()[0])

    def _places_of_ends(self) -> tuple[np.ndarray, np.ndarray]:
        positions, envs = np.nonzero(self._has_terminated(slice(self.replay_buffer.size())))
        usable = self._is_usable(positions, envs, held_out=False)
        return positions[usable], envs[usable]

    def sample_ends(self, n_samples: int) -> Transitions | None:
        """
        :param n_samples: number of steps, drawn with replacement
        :return: training steps that are known to have terminated, ``None`` if there are none
        """
        positions, envs = self._places_of_ends()
        if len(positions) == 0:
            return None
        chosen = np.random.randint(0, len(positions), size=n_samples)
        return self._gather(positions[chosen], envs[chosen])

    def lengths_of_terminated(self) -> np.ndarray:
        """
        :return: numbers of steps of the recorded episodes that are known to have terminated
        """
        buffer = self.replay_buffer
        rows = np.arange(buffer.size()) if not buffer.full else (buffer.pos + np.arange(buffer.size())) % buffer.size()
        dones, terminated = buffer.dones[rows] > 0, self._has_terminated(rows)
        lengths = []
        for env in range(buffer.n_envs):
            ends = np.flatnonzero(dones[:, env])
            # The beginning of the first episode may have been overwritten
            firsts = ends[:-1] if buffer.full else np.concatenate([[-1], ends[:-1]])
            ends = ends[len(ends) - len(firsts) :]
            lengths.append((ends - firsts)[terminated[ends, env]])
        return np.concatenate(lengths).astype(np.int64)

    def observed_last(self, n_samples: int, terminated: bool, held_out: bool = False) -> Transitions | None:
        """
        :param n_samples: largest number of steps
        :param terminated: whether to take steps that are known to have terminated, or steps that are known not to have
        :param held_out: whether to take held-out steps only
        :return: these steps, newest first; ``None`` if there are none
        """
        buffer = self.replay_buffer
        # Find rows, newest first
        if terminated:
            rows = np.flatnonzero(self._has_terminated(slice(buffer.size())).any(axis=1))
            rows = np.roll(rows, -np.searchsorted(rows, buffer.pos))[::-1]
            is_wanted = self._has_terminated(rows)
        else:
            # Unlike terminations, other steps are frequent: the newest rows contain enough of them
            rows = (buffer.pos - 1 - np.arange(min(self._n_intact_rows(), 2 * n_samples))) % buffer.buffer_size
            is_wanted = (buffer.dones[rows] == 0) | (buffer.timeouts[rows] > 0)
        if held_out:
            is_wanted = is_wanted & self._is_usable(*np.meshgrid(rows, np.arange(buffer.n_envs), indexing="ij"), held_out=True)
        places, envs = np.nonzero(is_wanted)
        if len(places) == 0:
            return None
        return self._gather(rows[places[:n_samples]], envs[:n_samples])

    def _n_intact_rows(self) -> int:
        # With optimize_memory_usage, the newest observation has overwritten the oldest step
        return self.replay_buffer.size() - int(self.replay_buffer.optimize_memory_usage and self.replay_buffer.full)

    def windows(self, n_steps: int, horizon: int) -> Windows | None:
        """
        :param n_steps: approximate number of latest steps. With many environments, only some of the environments are used, so
            that there are windows of full length
        :param horizon: largest number of steps of a window
        :return: one window for each of these steps, or ``None`` if there are none
        """
        buffer = self.replay_buffer
        n_rows = min(max(-(-n_steps // buffer.n_envs), 2 * horizon), self._n_intact_rows())
        if n_rows < 1:
            return None
        positions = (buffer.pos - 1 - np.arange(n_rows)[::-1]) % buffer.buffer_size
        chosen = np.arange(buffer.n_envs)[:: max(n_rows * buffer.n_envs // n_steps, 1)]
        rows, envs = np.meshgrid(positions, chosen, indexing="ij")
        steps = self._gather(rows.ravel(), envs.ravel())
        dones = buffer.dones[rows, envs] > 0
        records = {name: getattr(steps, name).cpu().numpy() for name in steps._fields}
        records = {name: array.reshape(*rows.shape, *array.shape[1:]) for name, array in records.items()}
        records["rewards"] = records["rewards"][..., 0]
        ends = dones.copy()
        ends[-1] = True
        # Find resets that the buffer does not record, as at the start of a continued training
        ends[:-1] |= (records["next_observations"][:-1] != records["observations"][1:]).any(axis=2)
        if buffer.optimize_memory_usage:
            # The last observation of an episode is not in the buffer: windows end one step earlier
            ends[:-1] |= dones[1:]
        windows = cut_windows(
            {**records, "terminated": self._has_terminated(positions)[:, chosen], "ends": ends},
            horizon,
            th.device(self.device),
        )
        if buffer.optimize_memory_usage:
            windows = windows.select(~dones.ravel())
        return windows if len(windows.lengths) > 0 else None


def choose_replay_buffer(algorithm: Any) -> tuple[type[ReplayBuffer] | None, dict[str, Any], int]:
    """
    Let SB3 choose the replay buffer that the value target needs, unless the user passed a class. SB3's earlier choice in a
    loaded algorithm is undone, because the value target may have changed. It is an ``NStepReplayBuffer`` with ``n_steps > 1``;
    with the user's ``NStepReplayBuffer``, ``n_steps`` is 1.

    :param algorithm: an algorithm that is being set up
    :return: class, keyword arguments and ``n_steps`` for SB3
    :raises ValueError: when observations, value target and the class do not go together
    """
    cls, kwargs, n_steps = algorithm.replay_buffer_class, algorithm.replay_buffer_kwargs, algorithm.n_steps
    n_target_steps = algorithm.value_target.replay_n_steps
    if cls is NStepReplayBuffer and n_steps > 1:
        cls = None
        kwargs = {key: value for key, value in kwargs.items() if key not in ("n_steps", "gamma")}
    if cls in (None, ReplayBuffer):
        cls, n_steps = None, n_target_steps
    check_support(cls, algorithm.observation_space, n_target_steps, algorithm.optimize_memory_usage)
    check_goals(cls, kwargs, algorithm.observation_space)
    return cls, kwargs, n_steps


def check_support(
    replay_buffer_class: type[ReplayBuffer] | None, observation_space: spaces.Space, n_steps: int, optimize_memory_usage: bool
) -> None:
    """
    :param replay_buffer_class: class of the replay buffer, ``None`` if SB3 chooses it
    :param observation_space: observation space of the algorithm
    :param n_steps: number of recorded steps that the value target spans
    :param optimize_memory_usage: argument of the algorithm
    :raises ValueError: when SB3's replay buffers do not support the combination
    """
    sums = replay_buffer_class is not None and issubclass(replay_buffer_class, NStepReplayBuffer)
    if isinstance(observation_space, spaces.Dict) and (n_steps > 1 or optimize_memory_usage or sums):
        setting = "optimize_memory_usage=True" if optimize_memory_usage else "an NStepReplayBuffer"
        if n_steps > 1:
            setting = f"a value target of {n_steps} recorded steps"
        raise ValueError(
            f"SB3's replay buffers support {setting} for a Box of observations only, got {observation_space}; flatten the "
            "observations (gymnasium.wrappers.FlattenObservation) or do without."
        )


def check_buffer_class(replay_buffer_class: Any, n_steps: int) -> None:
    """
    :param replay_buffer_class: argument of the constructor
    :param n_steps: number of recorded steps that the value target spans
    :raises TypeError: when it is no class of replay buffers
    :raises ValueError: when the class does not sum rewards over several steps and the value target needs that
    """
    if replay_buffer_class is None:
        return
    if not isinstance(replay_buffer_class, type) or not issubclass(replay_buffer_class, ReplayBuffer):
        raise TypeError(
            f"`replay_buffer_class` must be a class of replay buffers, or None for SB3's choice, got {replay_buffer_class!r}."
        )
    # There is none that sums for a Dict of observations
    if n_steps > 1 and not issubclass(replay_buffer_class, (NStepReplayBuffer, DictReplayBuffer)):
        raise ValueError(
            f"The value target spans {n_steps} recorded steps and needs an NStepReplayBuffer, "
            f"got replay_buffer_class={replay_buffer_class.__name__}; leave it at None."
        )


def check_replay_buffer(buffer: ReplayBuffer, algorithm: Any, gamma: float | None = None) -> None:
    """
    :param buffer: a replay buffer
    :param algorithm: the algorithm that is to learn from it
    :param gamma: discount that the buffer must have been made for; ``None`` for any, because callbacks may change it
    :raises ValueError: when the buffer has other spaces or another number of environments, or sums rewards over another number
        of steps or with another discount
    """
    for name in ("observation_space", "action_space"):
        shape, expected = shape_of(getattr(buffer, name)), shape_of(getattr(algorithm, name))
        if shape != expected:
            raise ValueError(
                f"The {name} of the replay buffer has the shape {shape}, that of the algorithm {expected}: load one that was "
                "recorded in this environment, or fill a new one."
            )
    if buffer.n_envs != algorithm.n_envs:
        raise ValueError(
            f"The replay buffer holds steps of n_envs={buffer.n_envs}, but the algorithm has n_envs={algorithm.n_envs}: give "
            "both as many environments, or fill a new buffer."
        )
    n_steps = algorithm.value_target.replay_n_steps
    n_steps_of_buffer, gamma_of_buffer = getattr(buffer, "n_steps", 1), getattr(buffer, "gamma", algorithm.gamma)
    if n_steps_of_buffer != n_steps or (gamma is not None and gamma_of_buffer != gamma):
        raise ValueError(
            f"The value target spans {n_steps} recorded steps with gamma={algorithm.gamma}, but the replay buffer was made "
            f"for n_steps={n_steps_of_buffer}, gamma={gamma_of_buffer}. A class of your own needs both in "
            "`replay_buffer_kwargs`, and a value target of as many steps (value_target='n_step_replay', "
            "value_target_kwargs={'n_steps': ...}); a saved buffer fits the settings that it was saved with."
        )


@contextmanager
def kept_if_refused(algorithm: Any) -> Iterator[None]:
    """
    Within this context the replay buffer is replaced. A ``ValueError`` brings the earlier one back.

    :param algorithm: the algorithm
    """
    before = getattr(algorithm, "replay_buffer", None)
    try:
        yield
    except ValueError:
        algorithm.replay_buffer = before
        raise
