"""
Compiles beside the training: another process compiles, and leaves the result in the cache on disk of torch's compiler. The
training goes on without it until a given update. It then traces its steps, which takes a second, and finds the compiled code
in the cache. If the other process failed, it compiles by itself; the numbers are the same.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import cloudpickle
import torch as th

from sb3_mpg.common.precision import get_matmul_precision, matmul_precision
from sb3_mpg.common.rollouts.steps import Steps

# Seconds between two looks at the folder
POLL_SECONDS = 0.02


def portable(value: Any) -> Any:
    """
    :param value: an argument of the steps: a tensor, a named tuple or dictionary of such arguments, or anything else
    :return: the same with leaves in place of tensors. A context has no critic and no steps, which no step needs
    """
    if isinstance(value, th.nn.Module):
        return value
    if isinstance(value, th.Tensor):
        copied = value.detach().clone(memory_format=th.preserve_format)
        # The compiler treats parameters otherwise than tensors
        is_parameter = isinstance(value, th.nn.Parameter)
        return th.nn.Parameter(copied, value.requires_grad) if is_parameter else copied.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        if names is None:
            return tuple(map(portable, value))
        items = dict(zip(names, value, strict=True)) | dict.fromkeys({"q_function", "steps"} & set(names))
        return type(value)(**{name: portable(item) for name, item in items.items()})
    return value


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """
    :param process: a process that leads a group, which includes the C++ compiler that it runs. The group is killed
    :param folder: its folder, which is removed
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


class CompilerProcess:
    """
    Another process that compiles steps, one request after the other in the order of their ranks. It ends with this process, or
    with the object.

    :raises OSError: when it cannot be started
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sb3_mpg_"))
        try:
            # The main script is not imported: it may have no main guard
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._folder)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for the training
                start_new_session=True,
            )
        except OSError:
            self._folder.rmdir()
            raise
        self._end = weakref.finalize(self, end, self._process, self._folder)

    def request(self, steps: Steps, method: str, args: tuple[Any, ...], rank: int) -> Path:
        """
        :param steps: strategy that compiles in a call of its method; it is pickled
        :param method: name of the method
        :param args: its arguments
        :param rank: of the request, of several the lowest comes first; each has its own
        :return: file that appears when it has been called
        :raises Exception: when something cannot be pickled, or the disk is full
        """
        settings = th.is_grad_enabled(), th.get_num_threads(), get_matmul_precision()
        packed = cloudpickle.dumps((steps, method, tuple(map(portable, args)), settings))
        path = self._folder / f"{rank}.request"
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(packed)
        unfinished.replace(path)
        return path.with_suffix(".done")

    def wait(self, done: Path) -> None:
        """
        Wait until a request is done, or will never be.

        :param done: file that appears when it is done
        """
        while not done.exists() and self._process.poll() is None:
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """End the process at once."""
        self._end()


def serve(folder: Path, parent: int) -> None:
    """
    Compile what is requested until the parent process has ended.

    :param folder: folder of the requests
    :param parent: id of the parent process
    """
    while os.getppid() == parent and folder.exists():
        path = min(folder.glob("*.request"), default=None)
        if path is None:
            time.sleep(POLL_SECONDS)
            continue
        # What fails here fails in the other process, too, which tells the user
        with contextlib.suppress(Exception):
            steps, method, args, (has_gradient, n_threads, precision) = cloudpickle.loads(path.read_bytes())
            th.set_num_threads(n_threads)
            with th.set_grad_enabled(has_gradient), matmul_precision(precision):
                getattr(steps, method)(*args)
        path.replace(path.with_suffix(".done"))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), os.getppid())
