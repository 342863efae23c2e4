"""
Constants and equations of the inverted pendulum task, for NumPy and torch.

The simulator is MuJoCo. The rigid-body equations here are used by the prior models; they are the equations that MuJoCo solves.
"""

from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

Array = Any  # np.ndarray or th.Tensor
ArrayModule = Any  # numpy or torch

TIMESTEP = 0.02  # s, MuJoCo's integration step
FRAME_SKIP = 2  # timesteps between two actions
STEP_TIME = FRAME_SKIP * TIMESTEP
MAX_CONTROL = 3.0  # the control that corresponds to an action of 1

# Outside of these limits an episode ends with an early reset
MAX_POSITION = 2.0  # m
MAX_ANGLE = 0.2  # rad

START_HALF_WIDTH = 0.01  # half width of the uniform start distribution of all four dimensions

# Weights of the squares of position, angle, velocity and angular velocity after the step
REWARD_WEIGHTS = (0.01, 1.0, 0.1, 0.1)

IMAGE_WIDTH, IMAGE_HEIGHT = 720, 480  # pixels

Integrator = Literal["euler", "rk4"]
RewardWeights = tuple[float, float, float, float]


@dataclass(frozen=True)
class PendulumParameters:
    """
    Parameters of the cart and its pole. The defaults are Table IV of the paper; damping and gear are from its simulator.

    :param cart_mass: kg
    :param pole_mass: mass of the pole, a uniform slender rod, kg
    :param pole_length: m
    :param gravity: m/s^2
    :param joint_damping: friction of the cart on its rail, N s/m, and of the hinge, N m s/rad
    :param gear: force per unit of control, N
    """

    cart_mass: float = 9.42
    pole_mass: float = 4.89
    pole_length: float = 0.6
    gravity: float = 9.81
    joint_damping: float = 1.0
    gear: float = 100.0


PAPER_PENDULUM = PendulumParameters()


class PendulumState(NamedTuple):
    """
    State of the cart and its pole, in the order of the observation.

    :param position: position of the cart, m
    :param angle: angle of the pole, rad, not wrapped; zero is upright, positive angles lean towards positive positions
    :param velocity: velocity of the cart, m/s
    :param angular_velocity: angular velocity of the pole, rad/s
    """

    position: Array
    angle: Array
    velocity: Array
    angular_velocity: Array


def mujoco_xml(parameters: PendulumParameters) -> str:
    """
    :param parameters: parameters of the cart and its pole
    :return: the MuJoCo model
    """
    template = Template((Path(__file__).parent / "assets" / "inverted_pendulum.xml").read_text(encoding="utf-8"))
    return template.substitute(
        cart_mass=parameters.cart_mass,
        pole_mass=parameters.pole_mass,
        pole_length=parameters.pole_length,
        pole_centre=parameters.pole_length / 2,
        pole_inertia=parameters.pole_mass * parameters.pole_length**2 / 12,
        gravity=parameters.gravity,
        joint_damping=parameters.joint_damping,
        gear=parameters.gear,
        timestep=TIMESTEP,
        max_control=MAX_CONTROL,
        max_position=MAX_POSITION,
        width=IMAGE_WIDTH,
        height=IMAGE_HEIGHT,
    )


def accelerations(
    state: PendulumState, force: Array, parameters: PendulumParameters, joint_damping: float, xp: ArrayModule
) -> tuple[Array, Array]:
    """
    Rigid-body dynamics of a cart with a uniform slender rod. With h = l / 2, they are D [x'', theta''] = z::

        D = [[M + m, m h cos(theta)], [m h cos(theta), m l^2 / 3]]
        z = [F + m h theta'^2 sin(theta) - c x', m g h sin(theta) - c theta']

    The matrix D in the paper's appendix is misprinted: its units are inconsistent. Its entries are those of a double pendulum
    that has the cart's mass as one of its rods.

    :param state: states, each ``(n,)``
    :param force: force on the cart, N, ``(n,)``
    :param parameters: parameters of the cart and its pole
    :param joint_damping: damping c of both joints
    :param xp: array module
    :return: acceleration of the cart, m/s^2, and angular acceleration of the pole, rad/s^2, each ``(n,)``
    """
    half_length = parameters.pole_length / 2
    sin, cos = xp.sin(state.angle), xp.cos(state.angle)
    moment = parameters.pole_mass * half_length
    total_mass = parameters.cart_mass + parameters.pole_mass
    hinge_inertia = parameters.pole_mass * parameters.pole_length**2 / 3
    coupling = moment * cos
    cart_force = force + moment * state.angular_velocity**2 * sin - joint_damping * state.velocity
    pole_torque = moment * parameters.gravity * sin - joint_damping * state.angular_velocity
    determinant = total_mass * hinge_inertia - coupling**2
    return (
        (hinge_inertia * cart_force - coupling * pole_torque) / determinant,
        (total_mass * pole_torque - coupling * cart_force) / determinant,
    )


def pendulum_step(
    state: PendulumState,
    force: Array,
    parameters: PendulumParameters,
    joint_damping: float,
    integrator: Integrator,
    n_substeps: int,
    xp: ArrayModule,
) -> PendulumState:
    """
    One step of the environment, 0.04 s.

    :param state: states, each ``(n,)``
    :param force: force on the cart, N, constant over the step, ``(n,)``
    :param parameters: parameters of the cart and its pole
    :param joint_damping: damping of both joints
    :param integrator: explicit Euler, or the classical Runge-Kutta method of order 4
    :param n_substeps: number of integration steps
    :param xp: array module
    :return: next states, each ``(n,)``
    """
    dt = STEP_TIME / n_substeps

    def derivative(current: PendulumState) -> PendulumState:
        acceleration, angular_acceleration = accelerations(current, force, parameters, joint_damping, xp)
        return PendulumState(current.velocity, current.angular_velocity, acceleration, angular_acceleration)

    def moved(start: PendulumState, slope: PendulumState, duration: float) -> PendulumState:
        return PendulumState(*(value + duration * change for value, change in zip(start, slope, strict=True)))

    for _ in range(n_substeps):
        k1 = derivative(state)
        if integrator == "euler":
            state = moved(state, k1, dt)
            continue
        k2 = derivative(moved(state, k1, dt / 2))
        k3 = derivative(moved(state, k2, dt / 2))
        k4 = derivative(moved(state, k3, dt))
        mean_slope = PendulumState(*((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)))
        state = moved(state, mean_slope, dt)
    return state


def pendulum_reward(next_state: PendulumState, weights: RewardWeights) -> Array:
    """
    The reward: equation (18) of the paper.

    :param next_state: states after the step, each ``(n,)``
    :param weights: weights of the squares of position, angle, velocity and angular velocity
    :return: rewards, ``(n,)``
    """
    position, angle, velocity, angular_velocity = next_state
    return -(weights[0] * position**2 + weights[1] * angle**2 + weights[2] * velocity**2 + weights[3] * angular_velocity**2)


def is_fallen(state: PendulumState) -> Array:
    """
    Whether the cart is too far from the centre or the pole leans too much (the early-reset region).

    :param state: states, each ``(n,)``
    :return: booleans, ``(n,)``
    """
    return (abs(state.position) >= MAX_POSITION) | (abs(state.angle) > MAX_ANGLE)
