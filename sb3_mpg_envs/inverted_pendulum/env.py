"""The inverted pendulum task as a Gymnasium environment."""

from sb3_mpg_envs.adapters import SimulatorEnv
from sb3_mpg_envs.inverted_pendulum.dynamics import PAPER_PENDULUM, PendulumParameters
from sb3_mpg_envs.inverted_pendulum.simulator import InvertedPendulumSimulator


class InvertedPendulumContiEnv(SimulatorEnv):
    """
    ## Description

    A cart on a rail balances a pole. The agent controls its motor 25 times per second. MuJoCo integrates the equations of
    motion with Runge-Kutta steps of 0.02 s. The task is that of
    [Guan et al., *Mixed Policy Gradient*](https://arxiv.org/abs/2102.11513). Unlike the reward of Gymnasium's
    `InvertedPendulum`, which is 1 as long as the pole does not fall, its reward is a quadratic function of the state.

    ## Action Space

    The action is a `ndarray` with shape `(1,)`. It is normalised: the environment multiplies it by the range of the motor's
    control. Actions outside of the space are clipped.

    | Num | Action                                            | Min | Max | Meaning of -1 | Meaning of 1 | Unit |
    |-----|---------------------------------------------------|-----|-----|---------------|--------------|------|
    | 0   | Control of the motor; its force is 100 N per unit | -1  | 1   | -3            | 3            | 1    |

    ## Observation Space

    The observation is a `ndarray` with shape `(4,)`. It is the complete state.

    | Num | Observation                                             | Unit  |
    |-----|---------------------------------------------------------|-------|
    | 0   | Position x of the cart                                  | m     |
    | 1   | Angle θ of the pole; 0 is upright, positive leans to +x | rad   |
    | 2   | Velocity of the cart                                    | m/s   |
    | 3   | Angular velocity of the pole                            | rad/s |

    All of them are unbounded; the observation space has bounds of ±1e6. The angle is not wrapped.

    ## Rewards

    *r = -(0.01 x² + θ² + 0.1 (dx/dt)² + 0.1 (dθ/dt)²)*

    The state is the one **after** the step. The best possible reward is 0.

    ## Starting State

    All four values are uniform in [-0.01, 0.01]. `start_width` is a factor on these bounds. With `early_reset`, starts in the
    early-reset region are drawn again. `reset(options={"state": observation})` starts in the state of the given observation.

    ## Episode End

    The episode is truncated

    - after 100 steps (4 s), by the registered time limit, and
    - by an *early reset*, if \\|x\\| ≥ 2 m or \\|θ\\| > 0.2 rad.

    The value of the state after a truncation is bootstrapped. With `early_reset_terminates=True`, an early reset *terminates*
    the episode instead, and `early_reset_penalty` is subtracted from its last reward. Without a penalty, the agent would
    learn to let the pole fall, because all rewards are negative. The default penalty, 50, is the discounted sum (discount
    factor 0.98) of a cost of 1 in each step, which is more than bad balancing costs.

    ## Models

    `prior_model()` returns the rough model of the paper, `InvertedPendulumModel`, with the parameters of this environment.
    `make_simulator(num_agents)` returns a simulator of many cart-poles with the settings of this environment.

    ## Arguments

    - `render_mode`: `None`, `"human"` (MuJoCo's viewer) or `"rgb_array"` (set the environment variable `MUJOCO_GL` to `egl`
      or `osmesa` on a machine without a display).
    - `parameters`: the `PendulumParameters`; the default is Table IV of the paper, with a damping of 1 in both joints and a
      gear of 100.
    - `early_reset` (`True`), `early_reset_terminates` (`False`), `early_reset_penalty` (`50.0`): see *Episode End*.
    - `start_width` (`1.0`): see *Starting State*.

    ```python
    >>> import gymnasium as gym
    >>> import sb3_mpg_envs
    >>> env = gym.make("InvertedPendulumConti-v0")
    >>> observation, info = env.reset(seed=0)
    >>> observation.shape
    (4,)

    ```

    ## Version History

    * v0: Initial version
    """

    # A copy, because wrappers may write into it
    metadata = dict(InvertedPendulumSimulator.metadata)  # noqa: RUF012

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        parameters: PendulumParameters = PAPER_PENDULUM,
        early_reset: bool = True,
        early_reset_terminates: bool = False,
        early_reset_penalty: float = 50.0,
        start_width: float = 1.0,
    ):
        simulator = InvertedPendulumSimulator(
            1,
            parameters=parameters,
            early_reset=early_reset,
            early_reset_terminates=early_reset_terminates,
            early_reset_penalty=early_reset_penalty,
            start_width=start_width,
        )
        super().__init__(simulator, render_mode)
