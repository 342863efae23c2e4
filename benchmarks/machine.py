"""What produced a result: the commit, the versions of the libraries and the processor."""

import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import sb3_mpg

#: Columns that every csv of the benchmarks has
ORIGIN = ("commit", "sb3_mpg", "torch", "stable_baselines3", "gymnasium", "processor")
REPOSITORY = Path(__file__).parent.parent


def processor_name() -> str:
    """
    :return: name of the processor
    """
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit(repository: Path = REPOSITORY) -> str:
    """
    :param repository: folder of a checkout
    :return: abbreviated commit of the checkout, with ``-dirty`` if Python files differ from it; ``unknown`` without git
    """

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], cwd=repository, capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD")
        is_dirty = git("diff", "--quiet", "HEAD", "--", "*.py").returncode != 0
    except FileNotFoundError:
        return "unknown"
    if commit.returncode != 0:
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if is_dirty else "")


def origin() -> dict[str, str]:
    """
    :return: the columns ``ORIGIN`` for results of this process
    """
    return {
        "commit": git_commit(),
        "sb3_mpg": sb3_mpg.__version__,
        "torch": version("torch"),
        "stable_baselines3": version("stable-baselines3"),
        "gymnasium": version("gymnasium"),
        "processor": processor_name(),
    }


def merged_origin(origins: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """
    :param origins: the columns ``ORIGIN`` of several results
    :return: the same columns for a result that is computed from all of them; different values are joined by slashes
    """
    origins = list(origins)
    return {name: " / ".join(dict.fromkeys(each[name] for each in origins if each[name])) for name in ORIGIN}
