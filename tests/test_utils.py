import platform
import subprocess
import sys

import numpy as np
import pytest
import torch as th

from sb3_mpg.common.checks import check_count
from sb3_mpg.common.utils import clip_norm

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about the C library of Linux")
def test_freed_memory_is_kept():
    """In a process of its own, as what was freed before matters."""
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
def test_norms_that_are_not_finite_are_told(bad):
    assert not np.isfinite(clip_norm([th.randn(3), th.tensor([1.0, bad])], 3.0))


@pytest.mark.parametrize("count", [True, 2.0, 1.5, -1, 1, "2", None, float("nan")])
def test_what_is_no_count_is_refused(count):
    with pytest.raises(ValueError, match="`n` must be a whole number, 2 or more, got"):
        check_count("n", count, 2)


def test_counts_of_numpy_are_counts():
    check_count("n", 2, 2)
    check_count("n", np.int64(3), 2)
