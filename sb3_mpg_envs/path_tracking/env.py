"""The path tracking task as a Gymnasium environment."""

from sb3_mpg_envs.adapters import SimulatorEnv
from sb3_mpg_envs.path_tracking.dynamics import PAPER_VEHICLE, VehicleParameters
from sb3_mpg_envs.path_tracking.simulator import PathTrackingSimulator


class PathTrackingEnv(SimulatorEnv):
    """
    ## Description

    A car follows a curved reference path at 20 m/s. The agent sets the steering angle and the acceleration ten times per
    second. The car is a bicycle model with linear tyres, integrated at 200 Hz: equation (15) of
    [Guan et al., *Mixed Policy Gradient*](https://arxiv.org/abs/2102.11513). The lateral position and the yaw angle of the
    path are

    - *y<sub>ref</sub>(x) = 7.5 sin(2πx/200) + 2.5 sin(2πx/300) - 5 sin(2πx/400)* and
    - *φ<sub>ref</sub>(x) = arctan(dy<sub>ref</sub>/dx)*.

    The path repeats itself every 1200 m.

    ## Action Space

    The action is a `ndarray` with shape `(2,)`. It is normalised: the environment multiplies it by the ranges of the
    actuators. Actions outside of the space are clipped.

    | Num | Action                        | Min | Max | Meaning of -1 | Meaning of 1 | Unit |
    |-----|-------------------------------|-----|-----|---------------|--------------|------|
    | 0   | Front wheel angle δ           | -1  | 1   | -0.4          | 0.4          | rad  |
    | 1   | Longitudinal acceleration acc | -1  | 1   | -3            | 3            | m/s² |

    ## Observation Space

    The observation is a `ndarray` with shape `(6,)`. It is the complete state.

    | Num | Observation                               | Min | Max  | Unit  |
    |-----|-------------------------------------------|-----|------|-------|
    | 0   | Speed error δu = u - 20                   | -19 | 15   | m/s   |
    | 1   | Lateral velocity v                        | -∞  | ∞    | m/s   |
    | 2   | Yaw rate r                                | -∞  | ∞    | rad/s |
    | 3   | Lateral error δy = y - y<sub>ref</sub>(x) | -∞  | ∞    | m     |
    | 4   | Heading error δφ = φ - φ<sub>ref</sub>(x) | -π  | π    | rad   |
    | 5   | Position x                                | 0   | 1200 | m     |

    The observation space has bounds of ±1e6 instead of ±∞. At the end of each step, the longitudinal velocity u is clipped to
    [1, 35] m/s, the heading error is wrapped to (-π, π], and the position is wrapped to the period of the path, [0, 1200) m.

    ## Rewards

    *r = -(0.01 δu² + 0.04 δy² + 0.1 δφ² + 0.02 r² + 5 δ² + 0.05 acc²)*

    The state is the one **before** the step, δ is in rad and acc in m/s². The best possible reward is 0.

    ## Starting State

    | Quantity                              | Distribution            |
    |---------------------------------------|-------------------------|
    | Position x                            | uniform in [0, 600] m   |
    | Lateral error δy                      | N(0, 1) m               |
    | Heading error δφ                      | N(0, π/9) rad           |
    | Longitudinal velocity u               | uniform in [15, 25] m/s |
    | Slip angle β; it sets v = u tan(β)    | N(0, 0.15) rad          |
    | Yaw rate r                            | N(0, 0.3) rad/s         |

    N(m, s) is the normal distribution with mean m and standard deviation s. `start_width` is a factor on all spreads; with 0
    the car starts on the path at x = 300 m with 20 m/s. With `early_reset`, starts in the early-reset region are drawn again.
    `reset(options={"state": observation})` starts in the state of the given observation.

    ## Episode End

    The episode is truncated

    - after 200 steps (20 s), by the registered time limit, and
    - by an *early reset*, if \\|δy\\| > 3 m, \\|δφ\\| > π/4, u < 2 m/s or \\|r\\| > 0.8 rad/s.

    The value of the state after a truncation is bootstrapped. With `early_reset_terminates=True`, an early reset *terminates*
    the episode instead, and `early_reset_penalty` is subtracted from its last reward. Without a penalty, the agent would
    learn to leave the road, because all rewards are negative. The default penalty, 100, is the discounted sum (discount
    factor 0.98) of a cost of 2 in each step, which is more than any reasonable driving costs.

    ## Models

    `prior_model()` returns the rough model of the paper, `PathTrackingModel`, with the vehicle parameters of this environment.
    `make_simulator(num_agents)` returns a simulator of many cars with the settings of this environment.

    ## Arguments

    - `render_mode`: `None`, `"human"` (a window) or `"rgb_array"`; rendering needs pygame.
    - `vehicle`: the `VehicleParameters`; the default is Table III of the paper.
    - `early_reset` (`True`), `early_reset_terminates` (`False`), `early_reset_penalty` (`100.0`): see *Episode End*.
    - `start_width` (`1.0`): see *Starting State*.
    - `compile` (`False`): compile the equations of motion where more than one car is stepped, that is in `make_simulator`,
      `PathTrackingVectorEnv` and `PathTrackingVecEnv` (which take the same arguments). The simulator then takes half of the
      time, and a `PathTrackingVecEnv` three quarters. The results agree to rounding error. The compilation takes about twenty
      seconds, or a few seconds if torch finds its result on disk. It needs a C++ compiler.

    ```python
    >>> import gymnasium as gym
    >>> import sb3_mpg_envs
    >>> env = gym.make("PathTracking-v0", start_width=0.5)
    >>> observation, info = env.reset(seed=0)
    >>> observation.shape
    (6,)

    ```

    ## Version History

    * v0: Initial version
    """

    # A copy, because wrappers may write into it
    metadata = dict(PathTrackingSimulator.metadata)  # noqa: RUF012

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        vehicle: VehicleParameters = PAPER_VEHICLE,
        early_reset: bool = True,
        early_reset_terminates: bool = False,
        early_reset_penalty: float = 100.0,
        start_width: float = 1.0,
        compile: bool = False,
    ):
        simulator = PathTrackingSimulator(
            1,
            vehicle=vehicle,
            early_reset=early_reset,
            early_reset_terminates=early_reset_terminates,
            early_reset_penalty=early_reset_penalty,
            start_width=start_width,
            compile=compile,
        )
        super().__init__(simulator, render_mode)
