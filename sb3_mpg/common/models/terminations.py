"""How far a model may be wrong about where episodes terminate."""

from collections.abc import Sequence

import numpy as np

# Largest share of terminations, or of other steps, at which a model may be wrong
MAX_MISJUDGED_ENDS = 0.5
# Missed terminations are ignored if they would occur in less than this share of the rollouts
MATTERING_ENDS = 0.1
# Lengths of episodes that end in certain states differ by at least this share of the longest one
SPREAD_OF_LENGTHS = 0.3
# Equal lengths are no coincidence if that is less probable than this
COINCIDENCE = 0.01
# One length stands out if this share of those within the spread has it
SHARE_OF_LIMIT = 0.9


def ends_matter(termination_rate: float, horizon: int) -> bool:
    """
    :param termination_rate: terminations for each step
    :param horizon: number of model steps of rollouts
    :return: whether terminations are frequent enough to matter within a rollout
    """
    return termination_rate * horizon > MATTERING_ENDS


def steps_of_episodes(ends: np.ndarray) -> np.ndarray:
    """
    :param ends: whether an episode ends at a step, bool ``(n_steps, n_envs)``
    :return: number of each step in its episode, from 1; the first row counts as the first step, ``(n_steps, n_envs)``
    """
    rows = np.arange(1, len(ends) + 1)[:, np.newaxis]
    last_ends = np.maximum.accumulate(np.where(ends, rows, 0), axis=0)
    return rows - np.concatenate([np.zeros_like(last_ends[:1]), last_ends[:-1]])


def looks_like_time_limit(episode_lengths: Sequence[int] | np.ndarray) -> int | None:
    """
    Whether an environment reports a time limit as a termination: then the longest episodes all have the same length. No
    model that knows only states can predict these ends. Episodes that end in certain states have different lengths, and
    some of these may be among the shorter ones here.

    :param episode_lengths: numbers of steps of the episodes that terminated, not of those that were truncated
    :return: the time limit in steps; ``None`` if the lengths do not look like one
    """
    lengths = np.asarray(episode_lengths, dtype=np.int64)
    if len(lengths) == 0:
        return None
    limit = int(lengths.max())
    spread = SPREAD_OF_LENGTHS * limit
    n_near, n_equal = int((lengths > limit - spread).sum()), int((lengths == limit).sum())
    # Each further episode hits one of the lengths within the spread by chance
    chance = (1 / (1 + spread)) ** (n_equal - 1)
    return limit if n_equal >= SHARE_OF_LIMIT * n_near and chance < COINCIDENCE else None
