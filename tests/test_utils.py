"""Gradients and parameters of networks."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import polyak_update

from sb3_mpg.common.utils import (
    clip_norm,
    copy_running_stats,
    expected_updates,
    finite_mean,
    gradient_of,
    parameters_of_modules,
    polyak_update_all,
    trainable_parameters,
)

FAULTS_OF_GRADIENTS = """
import resource
import torch as th
from sb3_mpg.common.utils import keep_freed_memory

def allocate():
    return [th.ones(256, 256) for _ in range(50)]

keep_freed_memory()
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tests the C library of Linux")
def test_freed_memory_is_kept():
    """In a process of its own, because memory that was freed before matters."""
    output = subprocess.run([sys.executable, "-c", FAULTS_OF_GRADIENTS], capture_output=True, text=True, check=True).stdout
    # Ten times 12.5 MiB are 32,000 pages
    assert int(output) < 1000


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e3, float("inf")])
def test_norms_are_clipped_as_by_torch(max_norm):
    gradients = [th.randn(5, 3), th.randn(7), th.randn(())]
    parameters = [th.nn.Parameter(th.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = th.nn.utils.clip_grad_norm_(parameters, max_norm)
    assert clip_norm(gradients, max_norm) == pytest.approx(expected.item(), rel=1e-6)
    th.testing.assert_close(gradients, [parameter.grad for parameter in parameters])


@pytest.mark.parametrize("bad", [th.nan, th.inf])
def test_norms_that_are_not_finite_are_returned(bad):
    assert not np.isfinite(clip_norm([th.randn(3), th.tensor([1.0, bad])], 3.0))


@pytest.mark.parametrize("tau", [0.0, 0.005, 1.0])
def test_targets_follow_as_in_sb3(tau):
    tensors, targets = [th.randn(5, 3), th.randn(7)], [th.randn(5, 3), th.randn(7)]
    expected = [target.clone() for target in targets]
    polyak_update(tensors, expected, tau)
    polyak_update_all(tensors, targets, tau)
    th.testing.assert_close(targets, expected)


def test_running_statistics_are_copied_and_nothing_else():
    network, target = (th.nn.Sequential(th.nn.Linear(3, 4), th.nn.BatchNorm1d(4)) for _ in range(2))
    before = target[0].weight.clone()
    network(th.randn(8, 3))
    copy_running_stats(network, target)
    assert th.equal(target[1].running_mean, network[1].running_mean) and target[1].running_mean.any()
    assert th.equal(target[1].running_var, network[1].running_var)
    assert th.equal(target[0].weight, before) and target[1].num_batches_tracked == 0


def test_gradients_are_those_of_trainable_parameters():
    network, inputs = th.nn.Sequential(th.nn.Linear(3, 4), th.nn.Linear(4, 2), th.nn.Linear(2, 2)), th.randn(5, 3)
    network[0].requires_grad_(False)
    assert trainable_parameters(network) == [*network[1].parameters(), *network[2].parameters()]
    # The loss does not depend on the last layer
    outputs = network[1](network[0](inputs))
    gradients = gradient_of((outputs**2).sum(), network)
    assert [gradient.shape for gradient in gradients] == [(2, 4), (2,), (2, 2), (2,)]
    th.testing.assert_close(gradients[1], 2 * outputs.sum(dim=0))
    assert not gradients[2].any() and not gradients[3].any()
    # In two factors
    by_parts = gradient_of(network[1](network[0](inputs)), network, 2 * outputs.detach())
    th.testing.assert_close(by_parts, gradients)


def test_parameters_by_their_modules():
    network = th.nn.Sequential(th.nn.Linear(2, 2), th.nn.Linear(2, 2))
    assert parameters_of_modules(network) == dict(network.named_parameters())
    network[1].weight = network[0].weight
    network.append(network[0])
    assert list(parameters_of_modules(network)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_mean_of_what_is_finite():
    assert finite_mean(th.tensor([[1.0], [th.nan], [3.0], [th.inf]])) == 2.0
    assert finite_mean(th.tensor([th.nan])).isnan()


@pytest.mark.parametrize(
    ("n_envs", "train_freq", "gradient_steps", "expected"),
    [
        (1, TrainFreq(1, TrainFrequencyUnit.STEP), 1, 1200),
        (3, TrainFreq(2, TrainFrequencyUnit.STEP), 4, 800),
        (3, TrainFreq(2, TrainFrequencyUnit.STEP), -1, 1200),
        (1, TrainFreq(1, TrainFrequencyUnit.EPISODE), 10, 0),
        (1, TrainFreq(1, TrainFrequencyUnit.EPISODE), -1, 1200),
    ],
)
def test_expected_number_of_updates(n_envs, train_freq, gradient_steps, expected):
    algorithm = SimpleNamespace(
        num_timesteps=300, learning_starts=0, n_envs=n_envs, train_freq=train_freq, gradient_steps=gradient_steps
    )
    assert expected_updates(algorithm, 1500) == expected
    # Nothing is updated before learning starts
    algorithm.learning_starts = 900
    assert expected_updates(algorithm, 1500) == expected / 2
    algorithm.learning_starts = 2000
    assert expected_updates(algorithm, 1500) == 0
