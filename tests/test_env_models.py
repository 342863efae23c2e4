import math

import numpy as np
import pytest
import torch as th

from sb3_mpg_envs.inverted_pendulum import InvertedPendulumModel, InvertedPendulumSimulator, PendulumParameters
from sb3_mpg_envs.path_tracking import PathTrackingModel, PathTrackingSimulator, VehicleParameters

N_STATES = 500


def random_path_tracking_batch(n_states: int = N_STATES) -> tuple[th.Tensor, th.Tensor]:
    rng = np.random.default_rng(0)
    states = rng.uniform([-18, -3, -1.5, -4, -2.5, 0], [14, 3, 1.5, 4, 2.5, 1200], (n_states, 6))
    # Across the end of the path's period
    states[: n_states // 10, 5] = np.linspace(1196.0, 1200.0, n_states // 10, endpoint=False)
    return th.as_tensor(states), th.as_tensor(rng.uniform(-1, 1, (n_states, 2)))


def random_pendulum_batch(n_states: int = N_STATES) -> tuple[th.Tensor, th.Tensor]:
    rng = np.random.default_rng(0)
    # Also upside down and beyond a full turn
    states = rng.uniform([-3, -7, -3, -6], [3, 7, 3, 6], (n_states, 4))
    return th.as_tensor(states), th.as_tensor(rng.uniform(-1, 1, (n_states, 1)))


TASKS = [
    pytest.param(PathTrackingModel, PathTrackingSimulator, random_path_tracking_batch, id="path_tracking"),
    pytest.param(InvertedPendulumModel, InvertedPendulumSimulator, random_pendulum_batch, id="inverted_pendulum"),
]


@pytest.mark.parametrize("model_class, simulator_class, random_batch", TASKS)
def test_exact_model_agrees_with_simulator(model_class, simulator_class, random_batch):
    states, actions = random_batch()
    simulator = simulator_class(N_STATES, early_reset=False)
    simulator.set_state(states.numpy())
    model = model_class.exact()
    for _ in range(3):
        next_states = model.transition(states, actions)
        rewards = model.reward(states, actions, next_states)
        _, simulated_rewards, _, _ = simulator.step(actions.numpy())
        assert rewards.shape == (N_STATES, 1)
        assert np.allclose(next_states.numpy(), simulator.get_state(), rtol=1e-9, atol=1e-9)
        assert np.allclose(rewards[:, 0].numpy(), simulated_rewards, rtol=1e-9, atol=1e-9)
        states = next_states


@pytest.mark.parametrize("model_class, simulator_class, random_batch", TASKS)
def test_terminal_region_agrees_with_simulator(model_class, simulator_class, random_batch):
    states, actions = random_batch()
    states = states * th.full((states.shape[1],), 0.3, dtype=states.dtype)  # some inside, some outside
    simulator = simulator_class(N_STATES, early_reset_terminates=True, early_reset_penalty=5.0)
    simulator.set_state(states.numpy())
    model = model_class.exact(terminates=True, early_reset_penalty=5.0)
    next_states = model.transition(states, actions)
    _, rewards, terminated, _ = simulator.step(actions.numpy())
    assert 0 < terminated.sum() < N_STATES
    terminal = model.terminal(next_states)
    assert terminal.dtype == th.bool
    assert np.array_equal(terminal.numpy(), terminated[:, np.newaxis])
    assert np.allclose(model.reward(states, actions, next_states)[:, 0].numpy(), rewards, atol=1e-9)
    # Truncation, the default, is not terminal
    assert not model_class.exact().terminal(next_states).any()
    # Rollouts of models that never terminate are cheaper
    assert model.may_terminate and not model_class.exact().may_terminate
    assert not simulator_class(1).prior_model().terminates
    assert not simulator_class(1, early_reset=False, early_reset_terminates=True).prior_model().terminates


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("model_class, simulator_class, random_batch", TASKS)
def test_gradients(model_class, simulator_class, random_batch, exact):
    states, actions = random_batch(6)
    # Away from the clipped speed and the wrapped position
    states, actions = 0.5 * states, 0.5 * actions
    states.requires_grad_(True)
    actions.requires_grad_(True)
    model = (model_class.exact() if exact else model_class()).eval()
    assert th.autograd.gradcheck(model.transition, (states, actions))
    next_states = model.transition(states, actions)
    assert th.autograd.gradcheck(model.reward, (states, actions, next_states.detach().requires_grad_(True)))
    # Every component of the action moves the next state
    (gradients,) = th.autograd.grad(next_states.square().sum(), actions)
    assert (gradients != 0).all()


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("model_class, simulator_class, random_batch", TASKS)
def test_dtype_and_batching(model_class, simulator_class, random_batch, dtype):
    states, actions = random_batch(4)
    states, actions = states.to(dtype), actions.to(dtype)
    model = model_class().eval()
    next_states = model.transition(states, actions)
    rewards = model.reward(states, actions, next_states)
    assert next_states.dtype == rewards.dtype == dtype
    assert next_states.shape == states.shape and rewards.shape == (4, 1)
    assert model.terminal(states).shape == (4, 1)
    for idx in range(4):
        row = slice(idx, idx + 1)
        assert th.allclose(model.transition(states[row], actions[row]), next_states[row], rtol=1e-5)
        assert th.allclose(model.reward(states[row], actions[row], next_states[row]), rewards[row], rtol=1e-5)
    assert next(model.parameters(), None) is None


def test_path_tracking_mismatch_of_the_paper():
    states, actions = random_path_tracking_batch(20000)
    model = PathTrackingModel()
    unbiased = PathTrackingModel(lateral_bias=0.0, lateral_noise=0.0)
    expected = unbiased.transition(states, actions)

    bias = model.eval().transition(states, actions) - expected
    assert th.allclose(bias, th.tensor([0, 0, 0, 0.5, 0, 0], dtype=bias.dtype))

    noise = model.train().transition(states, actions) - expected
    assert noise[:, 3].mean().item() == pytest.approx(0.5, abs=1e-3)
    assert noise[:, 3].std().item() == pytest.approx(0.01, rel=0.05)
    noise[:, 3] = 0
    assert (noise == 0).all()


def test_path_tracking_model_of_the_paper_by_hand():
    # One step of equation (15) with T = 0.1 s on a straight line
    u, v, r, y, phi, x, steering, acceleration = 21.0, 0.4, 0.1, 0.3, 0.05, 50.0, 0.02, 1.5
    c_f, c_r, a, b, m, i_z, dt = -88000.0, -94000.0, 1.14, 1.40, 1500.0, 2420.0, 0.1
    expected = [
        u + dt * (acceleration + v * r) - 20,
        (m * v * u + dt * (a * c_f - b * c_r) * r - dt * c_f * steering * u - dt * m * u**2 * r) / (m * u - dt * (c_f + c_r)),
        (-i_z * r * u - dt * (a * c_f - b * c_r) * v + dt * a * c_f * steering * u)
        / (dt * (a**2 * c_f + b**2 * c_r) - i_z * u),
        y + dt * (u * math.sin(phi) + v * math.cos(phi)) + 0.5,
        phi + dt * r,
        x + dt * (u * math.cos(phi) - v * math.sin(phi)),
    ]
    states = th.tensor([[u - 20, v, r, y, phi, x]], dtype=th.float64)
    actions = th.tensor([[steering / 0.4, acceleration / 3]], dtype=th.float64)
    assert th.allclose(PathTrackingModel().eval().transition(states, actions)[0], th.tensor(expected, dtype=th.float64))
    flipped = PathTrackingModel(steering_gain=-1.0).eval().transition(states, actions)
    mirrored = PathTrackingModel().eval().transition(states, actions * th.tensor([-1.0, 1.0]))
    assert th.equal(flipped, mirrored)


def test_path_tracking_angles_and_positions_wrap_with_gradient():
    states = th.tensor([[0.0, 0.0, 0.5, 0.0, 3.13, 1199.5]], dtype=th.float64, requires_grad=True)
    actions = th.zeros(1, 2, dtype=th.float64)
    next_states = PathTrackingModel(lateral_bias=0.0).eval().transition(states, actions)
    assert next_states[0, 4].item() == pytest.approx(3.13 + 0.05 - 2 * math.pi)
    (gradient,) = th.autograd.grad(next_states[0, 4], states)
    assert gradient[0, 4].item() == pytest.approx(1.0)
    assert 1197 < next_states[0, 5].item() < 1198  # driving backwards


def test_pendulum_mismatch_of_the_paper():
    states, actions = random_pendulum_batch(20000)
    model = InvertedPendulumModel()
    expected = InvertedPendulumModel(position_bias=0.0, position_noise=0.0).transition(states, actions)
    bias = model.eval().transition(states, actions) - expected
    assert th.allclose(bias, th.tensor([0.1, 0, 0, 0], dtype=bias.dtype))
    noise = model.train().transition(states, actions) - expected
    assert noise[:, 0].mean().item() == pytest.approx(0.1, abs=0.02)
    assert noise[:, 0].std().item() == pytest.approx(0.5, rel=0.05)
    assert (noise[:, 1:] == 0).all()

    # Explicit Euler: positions advance with the old velocities
    assert th.allclose(expected[:, :2], states[:, :2] + 0.04 * states[:, 2:])
    next_states = th.tensor([[1.0, 0.5, 2.0, 3.0]])
    reward = model.reward(states[:1], actions[:1], next_states)
    assert reward.item() == pytest.approx(-(0.01 + 0.25 + 0.001 * 4 + 0.001 * 9))


def test_pendulum_equations_by_hand():
    # Upright and at rest: the rod resists with a quarter of its mass, and falls backwards
    parameters = PendulumParameters()
    model = InvertedPendulumModel(position_bias=0.0).eval()
    # A control of 1, which is a force of 100 N
    action = th.full((1, 1), 1 / 3, dtype=th.float64)
    next_states = model.transition(th.zeros(1, 4, dtype=th.float64), action)
    acceleration = 100.0 / (parameters.cart_mass + parameters.pole_mass / 4)
    angular_acceleration = -1.5 * acceleration / parameters.pole_length
    expected = th.tensor([[0, 0, 0.04 * acceleration, 0.04 * angular_acceleration]], dtype=th.float64)
    assert th.allclose(next_states, expected)
    # Gravity increases a positive angle
    leaning = th.tensor([[0, 0.1, 0, 0]], dtype=th.float64)
    assert model.transition(leaning, th.zeros(1, 1, dtype=th.float64))[0, 3] > 0
    # force_gain
    flipped = InvertedPendulumModel(force_gain=-1.0).eval().transition(leaning, action)
    assert th.allclose(flipped, InvertedPendulumModel().eval().transition(leaning, -action))


def test_parameters_reach_the_models():
    vehicle = VehicleParameters(mass=3000.0, front_cornering_stiffness=-60000.0)
    states, actions = random_path_tracking_batch()
    simulator = PathTrackingSimulator(N_STATES, vehicle=vehicle)
    assert simulator.prior_model().vehicle == vehicle
    simulator.set_state(states.numpy())
    simulator.step(actions.numpy())
    assert np.allclose(PathTrackingModel.exact(vehicle).transition(states, actions).numpy(), simulator.get_state(), atol=1e-9)

    parameters = PendulumParameters(pole_mass=2.0, pole_length=1.0, joint_damping=0.3, gear=50.0, gravity=3.7, cart_mass=5.0)
    states, actions = random_pendulum_batch()
    pendulum = InvertedPendulumSimulator(N_STATES, parameters=parameters)
    assert pendulum.prior_model().pendulum == parameters
    pendulum.set_state(states.numpy())
    pendulum.step(actions.numpy())
    model = InvertedPendulumModel.exact(parameters)
    assert np.allclose(model.transition(states, actions).numpy(), pendulum.get_state(), atol=1e-8)


@pytest.mark.parametrize(
    "model_class, kwargs, message",
    [
        (PathTrackingModel, {"reference": "circle"}, "reference must be"),
        (PathTrackingModel, {"n_substeps": 0}, "n_substeps must be"),
        (InvertedPendulumModel, {"integrator": "midpoint"}, "integrator must be"),
        (InvertedPendulumModel, {"n_substeps": 0}, "n_substeps must be"),
        (InvertedPendulumModel, {"reward_weights": (1.0,)}, "reward_weights must be"),
    ],
)
def test_wrong_settings_are_refused(model_class, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model_class(**kwargs)


@pytest.mark.parametrize("model_class, simulator_class, random_batch", TASKS)
def test_models_have_no_graph_breaks(model_class, simulator_class, random_batch):
    # The "eager" backend traces without compiling: fast, and fullgraph fails on any data-dependent branch
    states, actions = random_batch(3)
    for model in (model_class(), model_class.exact(terminates=True)):
        model.eval()
        compiled = th.compile(model.transition, backend="eager", fullgraph=True)
        assert th.allclose(compiled(states, actions), model.transition(states, actions))
        rewards = th.compile(model.reward, backend="eager", fullgraph=True)(states, actions, states)
        assert th.equal(rewards, model.reward(states, actions, states))
