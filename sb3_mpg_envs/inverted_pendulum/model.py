"""Prior models of the inverted pendulum task."""

import torch as th

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
from sb3_mpg_envs.model import EarlyResetModel


class InvertedPendulumModel(EarlyResetModel):
    """
    A differentiable model of ``InvertedPendulumConti-v0``. Its state is the observation, ``(B, 4)``.

    The default is the rough model of the paper. It has four errors: the joints have no damping, the dynamics are integrated
    in a single explicit Euler step of 0.04 s, each step adds N(0.1, 0.5) m to the position (mean and standard deviation), and
    the reward weights of the velocities are too small. :meth:`exact` makes the model that agrees with MuJoCo. Other arguments
    make worse models: ``force_gain=-1.0`` pushes to the wrong side.

    The matrix D in the paper's appendix is misprinted: its units are inconsistent. This model has the rigid-body dynamics of
    a cart with a uniform rod, see :func:`~sb3_mpg_envs.inverted_pendulum.dynamics.accelerations`.

    Unlike the environment, the model does not clip actions to the action space. Clipping would remove the gradient at its
    border, and the actions of a policy are inside of it.

    :param parameters: parameters of the cart and its pole. Their ``joint_damping`` is *not* used, as the paper's model has
        none.
    :param joint_damping: damping of both joints of the model
    :param integrator: ``"euler"`` or ``"rk4"``
    :param n_substeps: number of integration steps per step of the environment
    :param position_bias: added to the position in each step, m
    :param position_noise: standard deviation of the noise on the position, m; only drawn in training mode
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
        super().__init__(terminates, early_reset_penalty)
        if integrator not in ("euler", "rk4"):
            raise ValueError(f"integrator must be 'euler' or 'rk4', got {integrator!r}")
        if n_substeps < 1:
            raise ValueError(f"n_substeps must be at least 1, got {n_substeps}")
        if len(reward_weights) != 4:
            raise ValueError(f"reward_weights must be four numbers, got {reward_weights}")
        # Not `self.parameters`, which is a method of nn.Module
        self.pendulum = parameters
        self.joint_damping = joint_damping
        self.integrator: Integrator = integrator
        self.n_substeps = n_substeps
        self.position_bias = position_bias
        self.position_noise = position_noise
        self.reward_weights = reward_weights
        self.force_gain = force_gain

    @classmethod
    def exact(
        cls,
        parameters: PendulumParameters = PAPER_PENDULUM,
        terminates: bool = False,
        early_reset_penalty: float = 0.0,
    ) -> "InvertedPendulumModel":
        """
        Make the model that agrees with the simulator step by step.

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

    def _step_reward(self, states: th.Tensor, actions: th.Tensor, next_states: th.Tensor) -> th.Tensor:
        return pendulum_reward(PendulumState(*next_states.unbind(-1)), self.reward_weights)

    def _is_outside(self, states: th.Tensor) -> th.Tensor:
        return is_fallen(PendulumState(*states.unbind(-1)))
