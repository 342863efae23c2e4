"""The path tracking task as a Gymnasium environment."""

from sb3_mpg_envs.path_tracking.dynamics import PAPER_VEHICLE, VehicleParameters
from sb3_mpg_envs.path_tracking.simulator import PathTrackingSimulator
from sb3_mpg_envs.simulator import SimulatorEnv


class PathTrackingEnv(SimulatorEnv):
    """
    ## Description

    A car has to follow a curved reference path at 20 m/s. It steers and accelerates ten times per second. The car is a
    bicycle model with linear tyres, integrated at 200 Hz: equation (15) of Guan et al., *Mixed Policy Gradient*. The path is

    *y<sub>ref</sub>(x) = 7.5 sin(2πx/200) + 2.5 sin(2πx/300) - 5 sin(2πx/400)*,
    *φ<sub>ref</sub>(x) = arctan(dy<sub>ref</sub>/dx)*,

    which repeats itself every 1200 m.

    ## Action Space

    The action is a `ndarray` with shape `(2,)`. It is normalised: the environment multiplies it by the ranges of the
    actuators. Actions outside of the space are clipped.

    | Num | Action                        | Min | Max | Meaning of -1 | Meaning of 1 | Unit |
    |-----|-------------------------------|-----|-----|---------------|--------------|------|
    | 0   | Front wheel angle δ           | -1  | 1   | -0.4          | 0.4          | rad  |
    | 1   | Longitudinal acceleration acc | -1  | 1   | -3            | 3            | m/s² |

    ## Observation Space

    The observation is a `ndarray` with shape `(6,)`. It describes the state completely.

    | Num | Observation                               | Min | Max  | Unit  |
    |-----|-------------------------------------------|-----|------|-------|
    | 0   | Speed error δu = u - 20                   | -19 | 15   | m/s   |
    | 1   | Lateral velocity v                        | -   | -    | m/s   |
    | 2   | Yaw rate r                                | -   | -    | rad/s |
    | 3   | Lateral error δy = y - y<sub>ref</sub>(x) | -   | -    | m     |
    | 4   | Heading error δφ = φ - φ<sub>ref</sub>(x) | -π  | π    | rad   |
    | 5   | Position x                                | 0   | 1200 | m     |

    The space writes ±1e6 for quantities without a limit. At the end of each step the longitudinal velocity u is clipped to
    [1, 35] m/s, the heading error is wrapped to (-π, π] and the position to the period of the path.

    ## Rewards

    *r = -(0.01 δu² + 0.04 δy² + 0.1 δφ² + 0.02 r² + 5 δ² + 0.05 acc²)*

    of the state **before** the step and its action, with δ in rad and acc in m/s². The best possible reward is 0.

    ## Starting State

    | Quantity              | Distribution                 |
    |-----------------------|------------------------------|
    | Position x            | uniform in [0, 600] m        |
    | Lateral error δy      | N(0, 1) m                    |
    | Heading error δφ      | N(0, π/9) rad                |
    | Velocity u            | uniform in [15, 25] m/s      |
    | Slip angle, v = u tan | N(0, 0.15) rad               |
    | Yaw rate r            | N(0, 0.3) rad/s              |

    (mean and standard deviation). `start_width` scales all spreads around their centres; with 0 the car starts
    on the path at x = 300 m with 20 m/s. With `early_reset`, starts inside the early-reset region are drawn again.
    `reset(options={"state": observation})` starts where an observation tells.

    ## Episode End

    The episode is truncated

    - after 200 steps (20 s), by the registered time limit, and
    - as an *early reset*, when \\|δy\\| > 3 m, \\|δφ\\| > π/4, u < 2 m/s or \\|r\\| > 0.8 rad/s.

    The value behind a truncation is to be bootstrapped. With `early_reset_terminates=True` an early reset *terminates*
    the episode instead. All rewards are negative, so that a free way out would teach the agent to leave the road; therefore
    `early_reset_penalty` is subtracted from the last reward. Its default, 100, is the discounted cost
    (discount factor 0.98) of 2 per step forever: more than what any reasonable driving costs.

    ## Models

    `prior_model()` returns the rough model of the paper, `PathTrackingModel`, with the parameters of this environment's
    vehicle. `make_simulator(num_agents)` returns a simulator with the same settings for many cars.

    ## Arguments

    - `render_mode`: `None`, `"human"` (a window) or `"rgb_array"`. Needs pygame.
    - `vehicle`: `VehicleParameters`; the default is Table III of the paper.
    - `early_reset` (`True`), `early_reset_terminates` (`False`), `early_reset_penalty` (`100.0`): see *Episode End*.
    - `start_width` (`1.0`): see *Starting State*.
    - `compile` (`False`): compile the equations of motion, once for each vehicle, for all that steps more than one car:
      `make_simulator` and the vector environments `PathTrackingVectorEnv` and `PathTrackingVecEnv`, which take the same
      arguments. The simulator needs half of the time, a `PathTrackingVecEnv`, which keeps books, three quarters. Compiling
      takes some twenty seconds once (torch keeps what it compiled on disk, and takes a few seconds later). The same numbers
      to rounding error. Needs a C++ compiler.

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

    # Copied, as wrappers may write into it
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
