"""Prior models of the inverted pendulum task."""

import torch as th

from sb3_mpg.common.models.base import PriorModel
from sb3_mpg_envs.inverted_pendulum.dynamics import (
    FRAME_SKIP,
    MAX_CONTROL,
    REWARD_WEIGHTS,
    Integrator,
    PAPER_PENDULUM,
    PendulumParameters,
    PendulumState,
    RewardWeights,
    is_fallen,
    pendulum_reward,
    pendulum_step,
)


class InvertedPendulumModel(PriorModel):
    """
    A differentiable model of ``InvertedPendulumConti-v0``; its state is the observation, ``(B, 4)``.

    By default the rough model of the paper: no damping in the joints, a single explicit Euler step of 0.04 s, N(0.1, 0.5) m
    added to the position in every step, and too small reward weights on the velocities. :meth:`exact` gives the
    model that agrees with MuJoCo. Worse models are one argument away (``force_gain=-1.0`` pushes to the wrong side).

    The matrix D in the paper's appendix is misprinted: its units do not match. This model has the rigid-body dynamics of a
    cart with a uniform rod, see :func:`sb3_mpg_envs.inverted_pendulum.dynamics.accelerations`.

    Actions are not clipped to the action space, as the environment does: the policy is bounded anyway, and clipping would
    remove its gradient at the border.

    :param parameters: parameters of the cart and its pole; their ``joint_damping`` is *not* used, as it is not in the paper
    :param joint_damping: damping of both joints that the model knows about
    :param integrator: ``"euler"`` or ``"rk4"``
    :param n_substeps: number of integration steps per step of the environment
    :param position_bias: added to the position in every step, m
    :param position_noise: standard deviation of the noise on the position, m; drawn in training mode only
    :param reward_weights: weights of the squares of position, angle, velocity and angular velocity
    :param force_gain: factor on the force
    :param terminates: the early-reset region is terminal (for environments with ``early_reset_terminates=True``)
    :param early_reset_penalty: subtracted from the reward of a step into the terminal region; only used with ``terminates``
    """

    def __init__(
        self,
        parameters: PendulumParameters = PAPER_PENDULUM,
        joint_damping: float = 0.0,
        integrator: Integrator = "euler",
        n_substeps: int = 1,
        position_bias: float = 0.1,
        position_noise: float = 0.5,
        reward_weights: RewardWeights = (0.01, 1.0, 0.001, 0.001),
        force_gain: float = 1.0,
        terminates: bool = False,
        early_reset_penalty: float = 0.0,
    ):
        super().__init__()
        if integrator not in ("euler", "rk4"):
            raise ValueError(f"integrator must be 'euler' or 'rk4', got {integrator!r}")
        if n_substeps < 1:
            raise ValueError(f"n_substeps must be at least 1, got {n_substeps}")
        if len(reward_weights) != 4:
            raise ValueError(f"reward_weights must be four numbers, got {reward_weights}")
        # nn.Module has a method called parameters
        self.pendulum = parameters
        self.joint_damping = joint_damping
        self.integrator: Integrator = integrator
        self.n_substeps = n_substeps
        self.position_bias = position_bias
        self.position_noise = position_noise
        self.reward_weights = reward_weights
        self.force_gain = force_gain
        self.terminates = terminates
        self.early_reset_penalty = early_reset_penalty

    @classmethod
    def exact(
        cls,
        parameters: PendulumParameters = PAPER_PENDULUM,
        terminates: bool = False,
        early_reset_penalty: float = 0.0,
    ) -> "InvertedPendulumModel":
        """
        The model that agrees with the simulator step by step.

        :param parameters: parameters of the cart and its pole
        :param terminates: the early-reset region is terminal
        :param early_reset_penalty: subtracted from the reward of a step into the terminal region
        :return: the model
        """
        return cls(
            parameters=parameters,
            joint_damping=parameters.joint_damping,
            integrator="rk4",
            n_substeps=FRAME_SKIP,
            position_bias=0.0,
            position_noise=0.0,
            reward_weights=REWARD_WEIGHTS,
            terminates=terminates,
            early_reset_penalty=early_reset_penalty,
        )

    def transition(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        next_state = pendulum_step(
            PendulumState(*states.unbind(-1)),
            self.force_gain * self.pendulum.gear * MAX_CONTROL * actions.squeeze(-1),
            self.pendulum,
            self.joint_damping,
            self.integrator,
            self.n_substeps,
            th,
        )
        position = next_state.position + self.position_bias
        if self.training and self.position_noise > 0:
            position = position + self.position_noise * th.randn_like(position)
        return th.stack(next_state._replace(position=position), -1)

    def reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        rewards = pendulum_reward(PendulumState(*next_states.unbind(-1)), self.reward_weights).unsqueeze(-1)
        if self.terminates and self.early_reset_penalty > 0:
            rewards = rewards - self.early_reset_penalty * self.terminal(next_states)
        return rewards

    @property
    def may_terminate(self) -> bool:
        return self.terminates

    def terminal(self, states: th.Tensor) -> th.Tensor:
        if not self.terminates:
            return super().terminal(states)
        return is_fallen(PendulumState(*states.unbind(-1))).unsqueeze(-1)
