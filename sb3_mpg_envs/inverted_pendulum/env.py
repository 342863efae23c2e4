"""The inverted pendulum task as a Gymnasium environment."""

from sb3_mpg_envs.inverted_pendulum.dynamics import PAPER_PENDULUM, PendulumParameters
from sb3_mpg_envs.inverted_pendulum.simulator import InvertedPendulumSimulator
from sb3_mpg_envs.simulator import SimulatorEnv


class InvertedPendulumContiEnv(SimulatorEnv):
    """
    ## Description

    A cart on a rail balances a pole. Its motor is controlled 25 times per second. MuJoCo integrates the system with
    Runge-Kutta steps of 0.02 s. The reward is continuous: being close to the centre and upright is better than merely not
    falling (Guan et al., *Mixed Policy Gradient*).

    ## Action Space

    The action is a `ndarray` with shape `(1,)`. It is normalised: the environment multiplies it by the range of the motor's
    control. Actions outside of the space are clipped.

    | Num | Action                                            | Min | Max | Meaning of -1 | Meaning of 1 | Unit |
    |-----|---------------------------------------------------|-----|-----|---------------|--------------|------|
    | 0   | Control of the motor; its force is 100 N per unit | -1  | 1   | -3            | 3            | 1    |

    ## Observation Space

    The observation is a `ndarray` with shape `(4,)`. It describes the state completely.

    | Num | Observation                                             | Unit  |
    |-----|---------------------------------------------------------|-------|
    | 0   | Position x of the cart                                  | m     |
    | 1   | Angle θ of the pole; 0 is upright, positive leans to +x | rad   |
    | 2   | Velocity of the cart                                    | m/s   |
    | 3   | Angular velocity of the pole                            | rad/s |

    None of them is limited (the space writes ±1e6); the angle is not wrapped.

    ## Rewards

    *r = -(0.01 x² + θ² + 0.1 (dx/dt)² + 0.1 (dθ/dt)²)*

    of the state **after** the step. The best possible reward is 0.

    ## Starting State

    All four values are uniform in [-0.01, 0.01], scaled by `start_width`.
    `reset(options={"state": observation})` starts where an observation tells.

    ## Episode End

    The episode is truncated

    - after 100 steps (4 s), by the registered time limit, and
    - as an *early reset*, when \\|x\\| ≥ 2 m or \\|θ\\| > 0.2 rad.

    The value behind a truncation is to be bootstrapped. With `early_reset_terminates=True` an early reset *terminates*
    the episode instead. All rewards are negative, so that a free way out would teach the agent to let the pole fall;
    therefore `early_reset_penalty` is subtracted from the last reward. Its default, 50, is the
    discounted cost (discount factor 0.98) of 1 per step forever: more than balancing badly costs.

    ## Models

    `prior_model()` returns the rough model of the paper, `InvertedPendulumModel`, with the parameters of this environment.
    `make_simulator(num_agents)` returns a simulator with the same settings for many cart-poles.

    ## Arguments

    - `render_mode`: `None`, `"human"` (MuJoCo's viewer) or `"rgb_array"` (without a display, set `MUJOCO_GL=egl` or
      `MUJOCO_GL=osmesa`).
    - `parameters`: `PendulumParameters`; the default is Table IV of the paper, with a damping of 1 in both joints and a
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

    # Copied, as wrappers may write into it
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
