"""
Constants and equations of the path tracking task, shared by the simulator (NumPy) and the prior model (torch).

The argument ``xp`` of the functions is the array module, ``numpy`` or ``torch``. The state of a vehicle consists of its
tracking errors ``(du, v, r, dy, dphi, x)``, which are arrays of one shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Array = Any  # np.ndarray or th.Tensor
ArrayModule = Any  # numpy or torch

STEP_TIME = 0.1  # s, between two actions
N_SUBSTEPS = 20  # of 1 / 200 s each
REFERENCE_SPEED = 20.0  # m/s
MIN_SPEED, MAX_SPEED = 1.0, 35.0  # m/s
MAX_STEERING = 0.4  # rad
MAX_ACCELERATION = 3.0  # m/s^2
# The controls that correspond to an action of 1, in the order of the action
MAX_CONTROLS = (MAX_STEERING, MAX_ACCELERATION)

# The reference path is a sum of sine curves: (amplitude in m, wavelength in m)
PATH_WAVES = ((7.5, 200.0), (2.5, 300.0), (-5.0, 400.0))
PATH_PERIOD = 1200.0  # m, the least common multiple of the wavelengths

# Outside of these limits an episode ends with an early reset
MAX_LATERAL_ERROR = 3.0  # m
MAX_HEADING_ERROR = math.pi / 4  # rad
MIN_USEFUL_SPEED = 2.0  # m/s
MAX_YAW_RATE = 0.8  # rad/s

# Start distribution: centres and half widths of uniform distributions, standard deviations of normal distributions
START_X_CENTRE, START_X_HALF_WIDTH = 300.0, 300.0  # m
START_SPEED_HALF_WIDTH = 5.0  # m/s, around the reference speed
START_LATERAL_ERROR_STD = 1.0  # m
START_HEADING_ERROR_STD = math.pi / 9  # rad
START_SLIP_ANGLE_STD = 0.15  # rad, with v = u tan(slip angle)
START_YAW_RATE_STD = 0.3  # rad/s

Reference = Literal["path", "straight"]


@dataclass(frozen=True)
class VehicleParameters:
    """
    Parameters of the bicycle model with linear tyres (Table III of the paper).

    :param front_cornering_stiffness: of the front axle, negative, N/rad
    :param rear_cornering_stiffness: of the rear axle, negative, N/rad
    :param front_axle_distance: from the centre of gravity to the front axle, m
    :param rear_axle_distance: from the centre of gravity to the rear axle, m
    :param mass: kg
    :param yaw_inertia: polar moment of inertia at the centre of gravity, kg m^2
    """

    front_cornering_stiffness: float = -88000.0
    rear_cornering_stiffness: float = -94000.0
    front_axle_distance: float = 1.14
    rear_axle_distance: float = 1.40
    mass: float = 1500.0
    yaw_inertia: float = 2420.0


PAPER_VEHICLE = VehicleParameters()

#: (left, right, output array) -> result
Operation = Callable[[Array, Array, Array], Array]


class Arithmetic(NamedTuple):
    """Operations with an output array. NumPy is faster when it need not allocate the result."""

    add: Operation
    subtract: Operation
    multiply: Operation
    divide: Operation


IN_PLACE = Arithmetic(np.add, np.subtract, np.multiply, np.divide)
# For torch, which cannot differentiate operations with an output array
OUT_OF_PLACE = Arithmetic(
    lambda left, right, _: left + right,
    lambda left, right, _: left - right,
    lambda left, right, _: left * right,
    lambda left, right, _: left / right,
)


class TrackingState(NamedTuple):
    """
    State of a vehicle on its path, in the order of the observation.

    :param speed_error: longitudinal velocity minus the reference speed, m/s
    :param lateral_velocity: m/s
    :param yaw_rate: rad/s
    :param lateral_error: lateral position minus that of the path at the same x, m
    :param heading_error: yaw angle minus that of the path, rad, in (-pi, pi]
    :param x: position along the x axis, m, in [0, 1200)
    """

    speed_error: Array
    lateral_velocity: Array
    yaw_rate: Array
    lateral_error: Array
    heading_error: Array
    x: Array


def wrap_angle(angle: Array, xp: ArrayModule) -> Array:
    """
    :param angle: angles, rad
    :param xp: array module
    :return: the angles wrapped to (-pi, pi]; the derivative is 1
    """
    # NumPy's remainder() would be the slowest function of the simulator
    return angle - 2 * math.pi * xp.ceil(angle / (2 * math.pi) - 0.5)


def sine_and_cosine(angle: Array, xp: ArrayModule) -> tuple[Array, Array]:
    """
    Sine and cosine from the tangent of half the angle. NumPy computes a tangent ten times as fast as a sine and a cosine.

    :param angle: angles, rad
    :param xp: array module
    :return: sines and cosines, in the shape of ``angle``
    """
    tangent = xp.tan(0.5 * angle)
    # Twice the squared cosine of half the angle, in [0, 2]: it does not overflow at the poles of the tangent
    factor = 2.0 / (1.0 + tangent * tangent)
    return tangent * factor, factor - 1.0


def path_reference(x: Array, reference: Reference, xp: ArrayModule) -> tuple[Array, Array]:
    """
    The reference path.

    :param x: positions along the x axis, m
    :param reference: the sine curves of the task (``"path"``) or the x axis (``"straight"``)
    :param xp: array module
    :return: lateral position of the path, m, and its yaw angle, rad, both in the shape of ``x``
    """
    if reference == "straight":
        return xp.zeros_like(x), xp.zeros_like(x)
    base_number = 2 * math.pi / PATH_PERIOD
    phase = base_number * x
    # All sine curves are harmonics of the path's period. The recursion sin((k + 1) p) = 2 cos(p) sin(k p) - sin((k - 1) p),
    # and the same for the cosines, is faster than a sine and a cosine of each curve
    sine, cosine = sine_and_cosine(phase, xp)
    sines, cosines = [0.0, sine], [1.0, cosine]
    double_cosine = 2 * cosine
    while len(sines) <= PATH_PERIOD / min(wavelength for _, wavelength in PATH_WAVES):
        sines.append(double_cosine * sines[-1] - sines[-2])
        cosines.append(double_cosine * cosines[-1] - cosines[-2])
    y, slope = 0.0, 0.0
    for amplitude, wavelength in PATH_WAVES:
        harmonic = round(PATH_PERIOD / wavelength)
        y = y + amplitude * sines[harmonic]
        slope = slope + (amplitude * harmonic * base_number) * cosines[harmonic]
    return y, xp.arctan(slope)


def vehicle_step(
    vehicle_state: tuple[Array, Array, Array, Array, Array, Array],
    steering: Array,
    acceleration: Array,
    vehicle: VehicleParameters,
    n_substeps: int,
    xp: ArrayModule,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """
    The bicycle model over one step of the environment: equation (15) of the paper, ``n_substeps`` times.

    The equation of v is divided by m and the equation of r by -I_z. The velocities do not depend on position and yaw.
    Therefore only the velocities are integrated step by step; the positions are sums over all substeps afterwards.

    :param vehicle_state: u, v (m/s), r (rad/s), y (m), phi (rad), x (m), each of shape ``(n,)``
    :param steering: front wheel angle, rad, ``(n,)``
    :param acceleration: longitudinal acceleration, m/s^2, ``(n,)``
    :param vehicle: parameters of the vehicle
    :param n_substeps: number of integration steps per step of the environment
    :param xp: array module
    :return: the next u, v, r, y, phi, x, neither clipped nor wrapped, each ``(n,)``
    """
    u, v, r, y, phi, x = vehicle_state
    dt = STEP_TIME / n_substeps
    c_front, c_rear = vehicle.front_cornering_stiffness, vehicle.rear_cornering_stiffness
    a, b = vehicle.front_axle_distance, vehicle.rear_axle_distance
    mass, inertia = vehicle.mass, vehicle.yaw_inertia

    def constant(value: float) -> Array:
        return xp.asarray(value, dtype=u.dtype)

    # The constants of the substeps, as arrays without dimensions, which are faster in NumPy than numbers
    v_damping = constant(-dt * (c_front + c_rear) / mass)
    v_coupling = constant((a * c_front - b * c_rear) / mass)
    v_steering = (dt * c_front / mass) * steering
    yaw_damping = constant(-dt * (a**2 * c_front + b**2 * c_rear) / inertia)
    yaw_coupling = constant(dt**2 * (a * c_front - b * c_rear) / inertia)
    yaw_steering = (dt**2 * a * c_front / inertia) * steering
    speed_gain = dt * acceleration

    is_numpy = xp is np
    add, subtract, multiply, divide = IN_PLACE if is_numpy else OUT_OF_PLACE
    # Output arrays for u, v and the turned angle after each substep, and one for intermediate results
    places: Any = np.empty((3, n_substeps, *u.shape)) if is_numpy else 3 * [n_substeps * [None]]
    spare = np.empty_like(u) if is_numpy else None

    # The recursion uses the yaw per substep, dt * r, which saves an operation in the innermost loop
    yaw = dt * r
    turned = xp.zeros_like(phi)
    # Displacements along the initial axes of the vehicle, which has not turned yet in the first substep
    ahead, aside = u, v
    steps = []
    for u_place, v_place, turned_place in zip(*places, strict=True):
        turned = add(turned, yaw, turned_place)
        next_u = add(add(u, speed_gain, u_place), multiply(yaw, v, spare), u_place)
        # (u (v - v_steering - u yaw) + v_coupling yaw) / (u + v_damping)
        next_v = subtract(subtract(v, v_steering, v_place), multiply(u, yaw, spare), v_place)
        next_v = add(multiply(u, next_v, v_place), multiply(v_coupling, yaw, spare), v_place)
        next_v = divide(next_v, add(u, v_damping, spare), v_place)
        # (u (yaw - yaw_steering) + yaw_coupling v) / (u + yaw_damping)
        yaw = multiply(u, subtract(yaw, yaw_steering, yaw), yaw)
        yaw = add(yaw, multiply(yaw_coupling, v, spare), yaw)
        yaw = divide(yaw, add(u, yaw_damping, spare), yaw)
        u, v = next_u, next_v
        steps.append((u, v, turned))

    if n_substeps > 1:
        # (n_substeps - 1, n)
        all_u, all_v, all_turned = places[:, :-1] if is_numpy else map(xp.stack, zip(*steps[:-1], strict=True))
        sin, cos = sine_and_cosine(all_turned, xp)
        ahead = ahead + (all_u * cos - all_v * sin).sum(0)
        aside = aside + (all_u * sin + all_v * cos).sum(0)
    ahead, aside = dt * ahead, dt * aside
    sin, cos = xp.sin(phi), xp.cos(phi)
    return u, v, yaw / dt, y + ahead * sin + aside * cos, phi + turned, x + ahead * cos - aside * sin


def tracking_step(
    state: TrackingState,
    path: tuple[Array, Array],
    steering: Array,
    acceleration: Array,
    vehicle: VehicleParameters,
    n_substeps: int,
    reference: Reference,
    xp: ArrayModule,
) -> tuple[TrackingState, tuple[Array, Array]]:
    """
    One step of the environment, from tracking errors to tracking errors.

    :param state: tracking errors, each ``(n,)``
    :param path: :func:`path_reference` at the vehicle, each ``(n,)``
    :param steering: front wheel angle, rad, ``(n,)``
    :param acceleration: longitudinal acceleration, m/s^2, ``(n,)``
    :param vehicle: parameters of the vehicle
    :param n_substeps: number of integration steps
    :param reference: the path to track
    :param xp: array module
    :return: next tracking errors, with the speed clipped and heading and position wrapped, and :func:`path_reference` at the
        next position, each ``(n,)``
    """
    y_ref, phi_ref = path
    u, v, r, y, phi, x = vehicle_step(
        (
            state.speed_error + REFERENCE_SPEED,
            state.lateral_velocity,
            state.yaw_rate,
            state.lateral_error + y_ref,
            state.heading_error + phi_ref,
            state.x,
        ),
        steering,
        acceleration,
        vehicle,
        n_substeps,
        xp,
    )
    y_ref, phi_ref = path_reference(x, reference, xp)
    next_state = TrackingState(
        speed_error=u.clip(MIN_SPEED, MAX_SPEED) - REFERENCE_SPEED,
        lateral_velocity=v,
        yaw_rate=r,
        lateral_error=y - y_ref,
        heading_error=wrap_angle(phi - phi_ref, xp),
        x=x - PATH_PERIOD * xp.floor(x / PATH_PERIOD),
    )
    return next_state, (y_ref, phi_ref)


def tracking_reward(state: TrackingState, steering: Array, acceleration: Array) -> Array:
    """
    The reward: equation (16) of the paper.

    :param state: tracking errors before the step, each ``(n,)``
    :param steering: front wheel angle, rad, ``(n,)``
    :param acceleration: longitudinal acceleration, m/s^2, ``(n,)``
    :return: rewards, ``(n,)``
    """
    return -(
        0.01 * state.speed_error**2
        + 0.04 * state.lateral_error**2
        + 0.1 * state.heading_error**2
        + 0.02 * state.yaw_rate**2
        + 5.0 * steering**2
        + 0.05 * acceleration**2
    )


def is_off_path(state: TrackingState) -> Array:
    """
    Whether a vehicle is in the early-reset region: too far from the path, too slow or spinning.

    :param state: tracking errors, each ``(n,)``
    :return: booleans, ``(n,)``
    """
    return (
        (abs(state.lateral_error) > MAX_LATERAL_ERROR)
        | (abs(state.heading_error) > MAX_HEADING_ERROR)
        | (state.speed_error + REFERENCE_SPEED < MIN_USEFUL_SPEED)
        | (abs(state.yaw_rate) > MAX_YAW_RATE)
    )
