"""The paper's baseline DDPG(model): DDPG whose policy takes further steps on states that are imagined by learned dynamics."""

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mpg import DVPG
from sb3_mpg.common.buffers import RecordedSteps
from sb3_mpg.common.models.trainable import evaluated
from sb3_mpg.common.rollouts.policy_gradient import mixed_policy_gradient

# Number of imagined trajectories, each as long as the episode; the paper gives neither number nor length
N_TRAJECTORIES = 10


class ImaginedUpdates(BaseCallback):
    """
    After each episode, roll the policy out in the learned dynamics from recorded states, with exploration noise, and take as
    many steps of the policy on the imagined states as the episode had. The critic learns from recorded steps alone.

    :param noise_std: standard deviation of the noise on actions in [-1, 1]
    """

    model: DVPG

    def __init__(self, noise_std: float = 0.1):
        super().__init__()
        self.noise_std = noise_std
        self.n_steps = 0

    def _on_step(self) -> bool:
        self.n_steps += 1
        if self.locals["dones"][0]:
            fitting = self.model.model_fitting
            if fitting is not None and fitting.is_prepared:
                self.train_policy(self.imagine(self.n_steps), self.n_steps)
            self.n_steps = 0
        return True

    @th.no_grad()
    def imagine(self, n_steps: int) -> th.Tensor:
        """
        :param n_steps: number of steps of each trajectory
        :return: imagined observations, ``(N_TRAJECTORIES * n_steps, O)``
        """
        dynamics, units = self.model.update.model, self.model.units()
        states = RecordedSteps(self.model.replay_buffer, units.unscale_actions, self.model.device).sample_observations(
            N_TRAJECTORIES
        )
        imagined = []
        with evaluated(dynamics):
            for _ in range(n_steps):
                actions = self.model.actor(units.normalize_observations(states))
                actions = (actions + self.noise_std * th.randn_like(actions)).clamp(-1, 1)
                states = dynamics.transition(states, units.unscale_actions(actions))
                imagined.append(states)
        return th.cat(imagined)

    def train_policy(self, observations: th.Tensor, n_updates: int) -> None:
        """
        :param observations: ``(N, O)``
        :param n_updates: number of steps of the policy's optimizer
        """
        context = self.model.update.context(self.model.units(), self.model.gamma)
        actor = self.model.actor
        for _ in range(n_updates):
            rows = th.randint(len(observations), (self.model.batch_size,))
            gradients = mixed_policy_gradient(observations[rows], context, {0: 1.0}).gradients
            for parameter, gradient in zip(actor.parameters(), gradients, strict=True):
                parameter.grad = gradient
            actor.optimizer.step()
