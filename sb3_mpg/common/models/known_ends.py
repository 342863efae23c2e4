"""Where episodes terminate in the tasks of Gymnasium, as a function of the observation (MuJoCo v5, classic control)."""

from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium.envs.registration import EnvSpec

#: Maps flat observations, ``(B, O)``, to whether an episode terminates there, bool ``(B, 1)``
Terminal = Callable[[th.Tensor], th.Tensor]
Interval = tuple[float, float]

# Tasks whose episodes are only truncated
NEVER_TERMINATE = ("HalfCheetah-v5", "Swimmer-v5", "HumanoidStandup-v5", "Pusher-v5", "Reacher-v5", "Pendulum-v1")
# Wrappers that leave observations and terminations alone
HARMLESS_WRAPPERS = frozenset(
    "Monitor TimeLimit OrderEnforcing PassiveEnvChecker RecordEpisodeStatistics RecordVideo HumanRendering "
    "RescaleAction ClipAction NormalizeReward TransformReward ScaleReward".split()
)
# Length of the double pendulum's poles, and the height of the tip at which it has fallen
POLE, FALLEN = 0.6, 1.0


class Never:
    """No episode terminates."""

    def __call__(self, observations: th.Tensor) -> th.Tensor:
        return th.zeros_like(observations[:, :1], dtype=th.bool)


class Leaves:
    """
    An episode terminates when an element of the observation leaves an interval, or is not finite.

    :param intervals: by the index of the element
    :param closed: whether the ends of the intervals belong to them; open by default
    :param others: an interval for all elements but the first, ``None`` for any values
    """

    def __init__(self, intervals: dict[int, Interval], closed: bool = False, others: Interval | None = None):
        self.intervals, self.closed, self.others = intervals, closed, others

    def _lies_in(self, values: th.Tensor, interval: Interval) -> th.Tensor:
        low, high = interval
        return (values >= low) & (values <= high) if self.closed else (values > low) & (values < high)

    def __call__(self, observations: th.Tensor) -> th.Tensor:
        is_healthy = th.isfinite(observations).all(dim=1, keepdim=True)
        for index, interval in self.intervals.items():
            is_healthy = is_healthy & self._lies_in(observations[:, index : index + 1], interval)
        if self.others is not None:
            is_healthy = is_healthy & self._lies_in(observations[:, 1:], self.others).all(dim=1, keepdim=True)
        return ~is_healthy


class TipFalls:
    """The tip of the double pendulum falls below a height. Observations hold sines and cosines of both angles."""

    def __call__(self, observations: th.Tensor) -> th.Tensor:
        first = th.atan2(observations[:, 1:2], observations[:, 3:4])
        second = th.atan2(observations[:, 2:3], observations[:, 4:5])
        return POLE * (first.cos() + (first + second).cos()) <= FALLEN


def known_terminal(spec: EnvSpec | None) -> Terminal | None:
    """
    :param spec: specification of an environment, ``None`` if it is not registered
    :return: where its episodes terminate; ``None`` if that is not known: for other tasks, and where wrappers or arguments
        change what is observed
    """
    if spec is None or "xml_file" in spec.kwargs:
        return None
    if any(wrapper.name not in HARMLESS_WRAPPERS for wrapper in spec.additional_wrappers):
        return None
    kwargs: dict[str, Any] = dict(spec.kwargs)
    if spec.id in NEVER_TERMINATE:
        return Never()
    if spec.id == "InvertedPendulum-v5":
        return Leaves({1: (-0.2, 0.2)}, closed=True)
    if spec.id == "InvertedDoublePendulum-v5":
        return TipFalls()
    if spec.id not in ("Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5"):
        return None
    if not kwargs.get("terminate_when_unhealthy", True):
        return Never()
    if not kwargs.get("exclude_current_positions_from_observation", True):
        return None
    heights, angles = kwargs.get("healthy_z_range"), kwargs.get("healthy_angle_range")
    if spec.id == "Hopper-v5":
        intervals = {0: heights or (0.7, float("inf")), 1: angles or (-0.2, 0.2)}
        return Leaves(intervals, others=kwargs.get("healthy_state_range", (-100.0, 100.0)))
    if spec.id == "Walker2d-v5":
        return Leaves({0: heights or (0.8, 2.0), 1: angles or (-1.0, 1.0)})
    if spec.id == "Ant-v5":
        return Leaves({0: heights or (0.2, 1.0)}, closed=True)
    return Leaves({0: heights or (1.0, 2.0)})
