import platform
import subprocess
import sys

import pytest

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
