"""Recorded data as models see them: single transitions, windows of several in a row, and rollouts compared with these."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mpg.common.models.base import PriorModel

# A statistic of fewer windows means nothing
MIN_WINDOWS = 8


class Transitions(NamedTuple):
    """
    Recorded transitions, in the units of the environment. None of them crosses a reset.

    :param observations: ``(B, O)``
    :param actions: ``(B, A)``
    :param rewards: ``(B, 1)``
    :param next_observations: ``(B, O)``
    :param terminated: 1 where the step terminated the episode, 0 where it did not, NaN where that is unknown, ``(B, 1)``
    """

    observations: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    next_observations: th.Tensor
    terminated: th.Tensor

    def select(self, is_kept: th.Tensor) -> "Transitions":
        """
        :param is_kept: which transitions, bool ``(B,)``
        :return: these transitions
        """
        return Transitions(*(tensor[is_kept] for tensor in self))


class Windows(NamedTuple):
    """
    Trajectory segments: recorded transitions, each followed by the rest of its episode, up to ``horizon`` steps.

    :param observations: ``(B, O)``
    :param actions: in the units of the environment, ``(horizon, B, A)``
    :param next_observations: ``(horizon, B, O)``
    :param rewards: ``(horizon, B, 1)``
    :param terminated: whether the first step terminated the episode, ``(B, 1)``
    :param lengths: number of recorded steps, ``(B,)``; the steps after them are padding
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    lengths: th.Tensor

    def select(self, is_kept: np.ndarray) -> "Windows":
        """
        :param is_kept: which windows, bool ``(B,)``
        :return: these windows
        """
        kept = th.as_tensor(is_kept, device=self.lengths.device)
        return Windows(
            self.observations[kept],
            self.actions[:, kept],
            self.next_observations[:, kept],
            self.rewards[:, kept],
            self.terminated[kept],
            self.lengths[kept],
        )


def cut_windows(records: dict[str, np.ndarray], horizon: int, device: th.device) -> Windows:
    """
    :param records: the fields of :class:`Transitions`, ``terminated`` and ``ends`` as arrays ``(n_steps, n_envs, ...)``;
        ``ends`` is true at each step that the next row does not continue, and at the last step
    :param horizon: largest number of steps of a window
    :param device: device of the windows
    :return: one window for each step, ``B = n_steps * n_envs``
    """
    ends = records["ends"]
    n_steps, n_envs = ends.shape
    lengths = np.ones((n_steps, n_envs), dtype=np.int64)
    for step in range(n_steps - 2, -1, -1):
        lengths[step] = np.where(ends[step], 1, lengths[step + 1] + 1)
    horizon = min(horizon, int(lengths.max()))
    # (horizon, n_steps, n_envs); the last step of an episode is repeated as padding
    steps = np.arange(n_steps)[None, :, None] + np.minimum(np.arange(horizon)[:, None, None], lengths[None] - 1)
    envs = np.broadcast_to(np.arange(n_envs), steps.shape)
    n_windows = n_steps * n_envs

    def gather(name: str) -> th.Tensor:
        array = records[name]
        return to_tensor(array[steps, envs].reshape(horizon, n_windows, *array.shape[2:]), device)

    def first(name: str) -> th.Tensor:
        array = records[name]
        return to_tensor(array.reshape(n_windows, *array.shape[2:]), device)

    return Windows(
        observations=first("observations"),
        actions=gather("actions"),
        next_observations=gather("next_observations"),
        rewards=gather("rewards").reshape(horizon, n_windows, 1),
        terminated=first("terminated").reshape(n_windows, 1).bool(),
        lengths=th.as_tensor(np.minimum(lengths, horizon).reshape(n_windows), device=device),
    )


class RolloutStep(NamedTuple):
    """
    One step of open-loop rollouts along recorded actions, together with the recorded step.

    :param states: predicted states, ``(B, S)``
    :param rewards: predicted rewards, ``(B, 1)``
    :param actual_states: recorded states, encoded from the observations, ``(B, S)``
    :param actual_rewards: the recorded rewards, ``(B, 1)``
    :param errors: difference of predicted and actual states, ``(B, S)``
    :param is_recorded: whether the window has this step, bool ``(B,)``; other rows are padding
    """

    states: th.Tensor
    rewards: th.Tensor
    actual_states: th.Tensor
    actual_rewards: th.Tensor
    errors: th.Tensor
    is_recorded: th.Tensor


@th.no_grad()
def rollout_errors(model: PriorModel, windows: Windows) -> Iterator[RolloutStep]:
    """
    Roll a model out from the first observations of windows, along their recorded actions.

    :param model: the model; its mode decides about noise
    :param windows: recorded trajectory segments
    :return: yields the predictions of one step after the other, each with its errors
    """
    states = model.state_from_observation(windows.observations)
    for step, actions in enumerate(windows.actions):
        states, rewards = model.step(states, actions)
        actual_states = model.state_from_observation(windows.next_observations[step])
        yield RolloutStep(
            states=states,
            rewards=rewards,
            actual_states=actual_states,
            actual_rewards=windows.rewards[step],
            errors=model.state_difference(states, actual_states),
            is_recorded=windows.lengths > step,
        )


def rounding_errors(values: np.ndarray) -> np.ndarray:
    """
    :param values: numbers that were computed in single precision, ``(B, ...)``
    :return: upper bounds of the rounding errors of numbers of this size, ``(...)``
    """
    return 1e-5 * np.abs(values).max(axis=0) + 1e-7


def rms(values: np.ndarray) -> np.ndarray:
    """
    :param values: ``(B, ...)``
    :return: root mean square over the first axis, infinite where a value is not finite, ``(...)``
    """
    with np.errstate(all="ignore"):
        roots = np.sqrt(np.mean(values**2, axis=0))
    return np.where(np.isfinite(roots), roots, np.inf)


def to_tensor(array: np.ndarray, device: th.device | str) -> th.Tensor:
    """
    :param array: any shape
    :param device: device of the tensor
    :return: a copy in single precision
    """
    # Never a view: BLAS and LAPACK may round otherwise where memory is aligned otherwise, as that of NumPy is by chance
    return th.tensor(array, dtype=th.float32, device=device)


def to_numpy(tensor: th.Tensor) -> np.ndarray:
    """
    :param tensor: any shape, on any device
    :return: the same numbers in double precision
    """
    return tensor.double().cpu().numpy()
