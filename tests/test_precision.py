"""The precision of products, and the kernels that follow from it."""

import os

import gymnasium as gym
import pytest
import torch as th
from lq import LinearEnv
from settings import SMALL
from stable_baselines3.common.callbacks import BaseCallback

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG
from sb3_mpg.common import off_policy_model_algorithm, precision
from sb3_mpg.common.precision import (
    DEFAULT,
    ONEDNN,
    choose_matmul_precision,
    factors_of_layers,
    is_as_exact,
    matmul_precision,
)
from sb3_mpg.common.value_targets import ReplayTarget

pytestmark = pytest.mark.usefixtures("models_are_fitted_once")


def current() -> str:
    return th.backends.mkldnn.matmul.fp32_precision


class Clock:
    """Stands for the ``time`` module: products take what ``seconds_of`` says of the precision that is set."""

    def __init__(self, seconds_of: dict[str, float]):
        self.seconds_of = seconds_of
        self.now, self.is_running = 0.0, False

    def perf_counter(self) -> float:
        # Called before and after
        self.now += self.seconds_of[current()] if self.is_running else 0.0
        self.is_running = not self.is_running
        return self.now


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "seconds_of, are_exact, expected",
    [
        ({DEFAULT: 2.0, ONEDNN: 1.0}, True, ONEDNN),
        ({DEFAULT: 2.0, ONEDNN: 1.0}, False, DEFAULT),
        # Not clearly faster
        ({DEFAULT: 1.1, ONEDNN: 1.0}, True, DEFAULT),
        ({DEFAULT: 1.0, ONEDNN: 2.0}, True, DEFAULT),
    ],
)
def test_onednn_is_taken_if_it_is_as_exact_and_clearly_faster(monkeypatch, seconds_of, are_exact, expected, scale):
    clock = Clock({precision: scale * seconds for precision, seconds in seconds_of.items()})
    monkeypatch.setattr(precision, "time", clock)
    monkeypatch.setattr(precision, "is_as_exact", lambda factors, precision: are_exact)
    network, random_state = th.nn.Linear(4, 3), th.get_rng_state()
    assert choose_matmul_precision(network, 8) == expected
    assert current() == DEFAULT
    assert th.equal(th.get_rng_state(), random_state)
    # The number of trials is limited, however long they take
    assert clock.now <= max(3 * sum(clock.seconds_of.values()), 0.2)


@pytest.mark.parametrize("kind", [{"dtype": th.float64}, {"device": "meta"}, None])
def test_other_networks_keep_the_setting(kind):
    network = th.nn.Identity() if kind is None else th.nn.Linear(4, 3, **kind)
    assert choose_matmul_precision(network, 8) == DEFAULT


def test_the_setting_of_a_user_is_kept(monkeypatch):
    monkeypatch.setattr(precision, "time", Clock({"ieee": 2.0, DEFAULT: 2.0, ONEDNN: 1.0}))
    monkeypatch.setattr(precision, "is_as_exact", lambda factors, precision: True)
    with matmul_precision("ieee"):
        assert choose_matmul_precision(th.nn.Linear(4, 3), 8) == DEFAULT
        with matmul_precision(DEFAULT):
            assert current() == "ieee"
    assert current() == DEFAULT


def test_old_versions_of_torch_have_no_such_setting(monkeypatch):
    monkeypatch.setattr(precision, "_setting", lambda: None)
    assert choose_matmul_precision(th.nn.Linear(4, 3), 8) == DEFAULT


def test_products_of_less_precision_are_found_out(monkeypatch):
    factors = factors_of_layers([th.randn(64, 32)], 16)
    assert [(left.shape, right.shape) for left, right in factors] == [((16, 32), (32, 64)), ((16, 64), (64, 32))]
    assert is_as_exact(factors, DEFAULT)
    exact = th.Tensor.__matmul__

    def rounded(left: th.Tensor, right: th.Tensor) -> th.Tensor:
        if left.dtype == th.float32 and current() == ONEDNN:
            return exact(left.bfloat16().float(), right.bfloat16().float())
        return exact(left, right)

    monkeypatch.setattr(th.Tensor, "__matmul__", rounded)
    assert not is_as_exact(factors, ONEDNN)


@pytest.mark.parametrize("env_id", ["PathTracking-v0", "InvertedPendulumConti-v0"])
def test_the_gradient_changes_by_rounding_only(env_id):
    env = gym.make(env_id)
    model = MPG("MlpPolicy", env, compile=False, learning_starts=40, seed=0).learn(50)
    observations = th.as_tensor(model.replay_buffer.observations[:32, 0])
    gradients = {}
    for name in (DEFAULT, ONEDNN):
        with matmul_precision(name):
            gradients[name] = model.policy_gradient(observations, 25)
    error = (gradients[ONEDNN] - gradients[DEFAULT]).norm() / gradients[DEFAULT].norm()
    weights = [parameter.detach() for parameter in model.actor.parameters() if parameter.ndim == 2]
    # Where products are of bfloat16, the setting is not used
    assert is_as_exact(factors_of_layers(weights, 32), ONEDNN) == (error < 1e-4)


class Precisions(BaseCallback):
    """Collects the settings of all steps."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def _on_step(self) -> bool:
        self.seen.add(current())
        if self.num_timesteps == 60:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("steps", [50, 100])
def test_training_leaves_the_settings_of_torch_as_they_were(monkeypatch, steps):
    def others():
        return th.backends.fp32_precision, th.backends.cuda.matmul.fp32_precision, th.backends.mkldnn.fp32_precision

    before = others()
    monkeypatch.setattr(off_policy_model_algorithm, "choose_matmul_precision", lambda network, batch_size: ONEDNN)
    model, precisions = MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 2), **SMALL), Precisions()
    if steps == 50:
        model.learn(steps, precisions)
    else:
        with pytest.raises(KeyboardInterrupt):
            model.learn(steps, precisions)
    assert precisions.seen == {ONEDNN}
    assert current() == DEFAULT
    assert others() == before


@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_users_of_torchs_other_settings_of_precision(value):
    """Some of torch's own functions fail when these are set."""
    before = th.backends.cuda.matmul.fp32_precision
    th.backends.cuda.matmul.fp32_precision = value
    try:
        MPG("MlpPolicy", LinearEnv(), compile=False, horizons=(0, 2), **SMALL).learn(44)
        assert th.backends.cuda.matmul.fp32_precision == value
    finally:
        th.backends.cuda.matmul.fp32_precision = before


class ComputedWithOneDNN(ReplayTarget):
    """Fails in the process that made it, and where products have the default precision."""

    def __init__(self):
        super().__init__()
        self.made_by = os.getpid()

    def __call__(self, *args):
        assert os.getpid() != self.made_by and current() == ONEDNN, (os.getpid(), self.made_by, current())
        return super().__call__(*args)


def test_learners_compute_with_the_setting_of_the_main_process(monkeypatch):
    monkeypatch.setattr(off_policy_model_algorithm, "choose_matmul_precision", lambda network, batch_size: ONEDNN)
    kwargs = {"value_target": ComputedWithOneDNN(), "n_learners": 1, "max_staleness": 0, "horizons": (0, 2)}
    model = MPG("MlpPolicy", LinearEnv(), compile=False, **kwargs, **SMALL).learn(44)
    assert model._n_updates == 4
