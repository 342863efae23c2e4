"""Prior models and learned models that several tests use."""

import copy
import math

import torch as th
from lq import LinearEnv
from torch.nn import functional as F

from sb3_mpg import PriorModel
from sb3_mpg.common.models.ensemble import NetworkEnsemble
from sb3_mpg.common.models.scaling import Standardizer
from sb3_mpg.common.models.trainable import TrainableModel, copy_to_cpu
from sb3_mpg.common.models.windows import Transitions


class KnowsNothing(PriorModel):
    """Nothing changes and nothing is rewarded."""

    def transition(self, states, actions):
        return states

    def reward(self, states, actions, next_states):
        return th.zeros(len(states), 1, dtype=states.dtype)


class Breaks(PriorModel):
    """A model that is fine for one step and overflows in the next."""

    def transition(self, states, actions):
        return 1e10 * states + actions

    def reward(self, states, actions, next_states):
        return -(next_states**2).sum(1, keepdim=True)


class Turntable(PriorModel):
    """An angle that is not wrapped, and a difference of angles that is."""

    def transition(self, states, actions):
        return states + 0.5 + 0.1 * actions

    def reward(self, states, actions, next_states):
        return states.cos()

    def state_difference(self, states, others):
        difference = states - others
        return difference - 2 * math.pi * th.round(difference / (2 * math.pi))


class Known(PriorModel):
    """s' = s + 0.1 a, r = -s^2: what a user might know of :func:`truth`."""

    def transition(self, states, actions):
        return states + 0.1 * actions

    def reward(self, states, actions, next_states):
        return -(states**2).sum(1, keepdim=True)


def truth(n_rows, seed=0):
    """Transitions of a system that is far from ``Known``."""
    rng = th.Generator().manual_seed(seed)
    states = 2 * th.rand(n_rows, 2, generator=rng) - 1
    actions = 2 * th.rand(n_rows, 2, generator=rng) - 1
    next_states = states - 0.3 * actions + 0.2 * th.sin(3 * states) + 0.5
    rewards = -(states**2).sum(1, keepdim=True) + actions[:, :1] ** 2
    return Transitions(states, actions, rewards, next_states, th.zeros_like(rewards))


def batch_of(transitions, n_rows, seed):
    """Rows drawn at random, with replacement."""
    rows = th.randint(len(transitions.rewards), (n_rows,), generator=th.Generator().manual_seed(seed))
    return Transitions(*(tensor[rows] for tensor in transitions))


class HiddenVelocity(PriorModel):
    """p' = p + 0.1 v, v' = v + 0.3 a; observations show p alone."""

    def transition(self, states, actions):
        return th.cat([states[:, :1] + 0.1 * states[:, 1:], states[:, 1:] + 0.3 * actions], dim=1)

    def reward(self, states, actions, next_states):
        return -(states[:, :1] ** 2)

    def observation(self, states):
        return states[:, :1]

    def state_from_observation(self, observations):
        return th.cat([observations, th.zeros_like(observations)], dim=1)


class LearnedDynamics(TrainableModel):
    """An ensemble that knows nothing at first: s' = s + D(s, a), r = R(s, a)."""

    def __init__(self, n_states=2, n_actions=2, n_members=2, net_arch=(64,), learning_rate=3e-3):
        super().__init__()
        self.n_states, self.n_members = n_states, n_members
        self.standardizer = Standardizer(n_states + n_actions)
        self.networks = NetworkEnsemble(n_members, n_states + n_actions, n_states + 1, net_arch, learning_rate)
        self.register_buffer("target_mean", th.zeros(n_states + 1))
        self.register_buffer("target_std", th.ones(n_states + 1))

    def _scaled(self, transitions):
        inputs = self.standardizer(th.cat([transitions.observations, transitions.actions], dim=1))
        targets = th.cat([transitions.next_observations - transitions.observations, transitions.rewards], dim=1)
        return inputs, (targets - self.target_mean) / self.target_std

    def step(self, states, actions):
        outputs = self.networks(self.standardizer(th.cat([states, actions], dim=1)), self.members)
        outputs = outputs * self.target_std + self.target_mean
        return states + outputs[:, : self.n_states], outputs[:, self.n_states :]

    def transition(self, states, actions):
        return self.step(states, actions)[0]

    def reward(self, states, actions, next_states):
        return self.step(states, actions)[1]

    def rescale(self, transitions):
        self.standardizer.fit(th.cat([transitions.observations, transitions.actions], dim=1))
        targets = th.cat([transitions.next_observations - transitions.observations, transitions.rewards], dim=1)
        self.target_mean.copy_(targets.mean(dim=0))
        self.target_std.copy_(targets.std(dim=0))
        self.networks.reset_outputs()

    def needs_rescaling(self, transitions):
        _, targets = self._scaled(transitions)
        return bool(targets.abs().mean() > 10)

    def fit(self, transitions):
        inputs, targets = self._scaled(transitions)
        loss = F.mse_loss(self.networks(inputs, "dealt", is_fitting=True), targets)
        self.networks.descend(loss)
        return loss.item()

    @th.no_grad()
    def validation_error(self, transitions):
        inputs, targets = self._scaled(transitions)
        return F.mse_loss(self.networks(inputs, "dealt"), targets).item()

    def learned_state(self):
        return copy_to_cpu({"model": self.state_dict(), "optimizer": self.networks.optimizer.state_dict()})

    def load_learned_state(self, state):
        own, saved = self.state_dict(), state["model"]
        if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
            return False
        self.load_state_dict(saved)
        self.networks.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        return True


class Counter(PriorModel):
    """s' = s + a. Above 10 it is not a number, and below -3 it terminates."""

    may_terminate = True

    def transition(self, states, actions):
        return th.where(states + actions > 10, th.nan, states + actions)

    def reward(self, states, actions, next_states):
        return -(states**2)

    def terminal(self, next_states):
        return next_states < -3


class Wrong(PriorModel):
    """The model of ``LinearEnv``, but actions have five times their effect, in the wrong direction."""

    def __init__(self):
        super().__init__()
        self.right = LinearEnv().prior_model()

    def transition(self, states, actions):
        return self.right.transition(states, -5 * actions)

    def reward(self, states, actions, next_states):
        return self.right.reward(states, actions, next_states)
