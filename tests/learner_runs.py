"""Small trainings with learner processes, and what goes on in them."""

import multiprocessing as mp
import os
import time
from pathlib import Path

import settings
from lq import LinearEnv
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mpg import MPG, PriorModel

SMALL = {
    **settings.SMALL,
    "policy_kwargs": {"net_arch": [8]},
    "batch_size": 16,
    "horizons": (0, 2),
    "residual": False,
    "weighting": "constant",
}
OF_MPG = ("horizons", "residual", "weighting")


def small_model(env=None, cls=MPG, **kwargs):
    kwargs = {**SMALL, **kwargs}
    if cls is not MPG:
        for name in OF_MPG:
            del kwargs[name]
    return cls("MlpPolicy", LinearEnv() if env is None else env, **kwargs)


def in_learner():
    return mp.current_process().name.startswith("learner")


def learner_pids(model):
    return [learner.worker.process.pid for learner in model.learners._pool.learners]


def shared_files(pid):
    """Those with a name, and those without that are still open."""
    named = list(Path("/dev/shm").glob(f"*{pid}*"))
    opened = Path(f"/proc/{pid}/fd")
    return named + [fd for fd in opened.glob("*") if fd.is_symlink() and str(os.readlink(fd)).startswith("/dev/shm/")]


class Each(BaseCallback):
    """Calls a function at each step."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_step(self):
        return self.function(self.model) is not False


def never(model):
    raise AssertionError("the error must come before the first environment step")


def when_learning(action, at=10):
    """A callback that acts once, after some updates."""
    done = []

    def function(model):
        if model._n_updates >= at and not done:
            done.append(True)
            return action(model)

    return Each(function)


class Tired(PriorModel):
    """Slow, but only in the second learner."""

    def transition(self, states, actions):
        if mp.current_process().name == "learner-1":
            time.sleep(0.05)
        return states + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


class SlowInLearners(Tired):
    def transition(self, states, actions):
        if in_learner():
            time.sleep(0.005)
        return states + 0.1 * actions


class Custom(Exception):
    """An exception of the user's."""


class Fails(Tired):
    """Fails in training, and not when it is checked."""

    def reward(self, states, actions, next_states):
        if in_learner() and self.training:
            raise Custom("the road ends here")
        return super().reward(states, actions, next_states)
