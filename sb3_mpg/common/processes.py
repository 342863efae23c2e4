"""Worker processes that always end with the main process."""

import multiprocessing as mp
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.heap import Arena
from typing import Any, NamedTuple, NoReturn

import cloudpickle
import torch as th

# Exit code of a child process that would start processes while it imports the main script
NO_MAIN_GUARD = 78
# Exit code of a process that ran out of memory
OUT_OF_MEMORY = 79
NO_MAIN_GUARD_MESSAGE = (
    "Processes start by importing the main script again: put what trains under `if __name__ == '__main__':`."
)
# Seconds that a process may take to end before it is killed
GRACE_SECONDS = 1.0
START_METHODS = ("forkserver", "spawn")


def check_start_method(start_method: str | None) -> str:
    """
    :param start_method: ``"forkserver"``, ``"spawn"``, or ``None`` for the first of them that the system has
    :return: name of the start method
    :raises ValueError: for other methods. ``"fork"`` is unsafe: it copies locks that other threads hold
    """
    available = [method for method in START_METHODS if method in mp.get_all_start_methods()]
    if start_method is None:
        return available[0]
    if start_method not in available:
        raise ValueError(f"The start method of processes must be one of {available}, got {start_method!r}.")
    return start_method


def exit_without_main_guard() -> None:
    """
    Call this before starting processes. A child process that imports a main script without a guard would start processes
    as well. It exits here, with a code that tells the parent why.
    """
    if getattr(mp.current_process(), "_inheriting", False):
        os._exit(NO_MAIN_GUARD)


def process_context(start_method: str | None = None) -> BaseContext:
    """
    :param start_method: see :func:`check_start_method`
    :return: context that processes are started with
    """
    context = mp.get_context(check_start_method(start_method))
    if context.get_start_method() == "forkserver":
        # The server imports torch once, so that processes start quickly. It has no effect once the server runs.
        context.set_forkserver_preload([__name__])
    return context


class RemoteTraceback(Exception):
    """
    The traceback of an exception in another process; it is the cause of that exception when it is raised here.

    :param text: the traceback
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"in another process:\n\n{self.text}"


class Ready(NamedTuple):
    """Message of a worker: it has started."""


class Failure(NamedTuple):
    """
    Message of a worker: it ended with an exception.

    :param packed: the exception, pickled; ``None`` if it cannot be pickled
    :param traceback_text: its traceback
    """

    packed: bytes | None
    traceback_text: str

    @classmethod
    def of(cls, error: BaseException, traceback_text: str) -> "Failure":
        """
        :param error: an exception
        :param traceback_text: its traceback
        :return: the message
        """
        try:
            packed = cloudpickle.dumps(error)
            # Some exceptions can be pickled, but not unpickled
            cloudpickle.loads(packed)
        except Exception:
            return cls(None, traceback_text)
        return cls(packed, traceback_text)

    def reraise(self) -> NoReturn:
        """
        :raises BaseException: the exception, with its traceback in the other process as its cause
        """
        error = RuntimeError("An exception that cannot be sent between processes; see its traceback above.")
        if self.packed is not None:
            error = cloudpickle.loads(self.packed)
        raise error from RemoteTraceback(self.traceback_text)


def is_out_of_memory(error: BaseException) -> bool:
    """
    :param error: an exception
    :return: whether memory ran out; torch raises a ``RuntimeError`` for memory of the CPU
    """
    return isinstance(error, (MemoryError, th.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _exit_with_parent() -> None:
    """End this process when the main process ends or is killed, even while this process computes."""
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run(target: Callable[..., None], connection: Connection, args: tuple[Any, ...]) -> None:
    """
    Main function of a worker process. An exception is sent to the main process as a :class:`Failure`. A process that runs out
    of memory exits, as if the system had killed it.

    :param target: takes the connection and the arguments
    :param connection: connection to the main process
    :param args: the arguments
    """
    # Ignore Ctrl-C, which every process of the terminal receives: the main process ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    th.set_num_threads(1)
    hung_up = (EOFError, BrokenPipeError, ConnectionResetError)
    try:
        try:
            target(connection, *args)
        except hung_up:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                traceback.print_exc()
                sys.exit(OUT_OF_MEMORY)
            connection.send(Failure.of(error, traceback.format_exc()))
    except hung_up:
        # The main process closed the connection
        sys.exit(1)


class SharedBytes:
    """
    Bytes in shared memory, for arguments that are too large for the pipe through which a process is started. If the process
    died before it read all, the interpreter would wait forever.

    :param data: a pickle
    """

    def __init__(self, data: bytes):
        self.size = len(data)
        self.arena = Arena(self.size)
        self.arena.buffer[: self.size] = data

    def load(self) -> Any:
        """
        :return: the unpickled object
        """
        return cloudpickle.loads(self.arena.buffer[: self.size])


class Worker:
    """
    A process and a connection to it.

    :param context: what :func:`process_context` returned
    :param target: function of a module, which takes the connection and the arguments
    :param args: the arguments: small objects and shared memory
    :param name: name of the process
    :raises RuntimeError: when the process cannot be started
    """

    def __init__(self, context: BaseContext, target: Callable[..., None], args: tuple[Any, ...], name: str):
        exit_without_main_guard()
        self.connection, child_connection = context.Pipe()
        # Daemon: the interpreter ends the process at exit, even if it was not closed
        self.process = context.Process(  # type: ignore[attr-defined]
            target=_run, args=(target, child_connection, args), name=name, daemon=True
        )
        try:
            self.process.start()
        finally:
            child_connection.close()

    def is_alive(self) -> bool:
        """
        :return: whether the process runs
        """
        return self.process.is_alive()

    def exit_code(self) -> int | None:
        """
        :return: exit code of a process that has ended or is about to end; negative after a signal, ``None`` if it still runs
        """
        self.process.join(GRACE_SECONDS)
        return self.process.exitcode

    def close(self, grace_seconds: float = 0.0) -> None:
        """
        End the process, and wait until it has ended. Calling it again does nothing.

        :param grace_seconds: how long to wait before the process is killed
        """
        if self.connection.closed:
            return
        self.connection.close()
        if grace_seconds > 0:
            self.process.join(grace_seconds)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
