"""Worker processes that leave nothing behind."""

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

# Exit code of a process that imported the main script and found itself asked to start processes
NO_MAIN_GUARD = 78
# Exit code of a process whose memory was not enough
OUT_OF_MEMORY = 79
NO_MAIN_GUARD_MESSAGE = (
    "Processes start by importing the main script again: put what trains under `if __name__ == '__main__':`."
)
# How long a process that was told to end may take
GRACE_SECONDS = 1.0
START_METHODS = ("forkserver", "spawn")


def check_start_method(start_method: str | None) -> str:
    """
    :param start_method: ``"forkserver"``, ``"spawn"``, or ``None`` for the first of them that the system has
    :return: the name
    :raises ValueError: when there is no such method; ``"fork"`` copies locks and threads in whatever state they are
    """
    available = [method for method in START_METHODS if method in mp.get_all_start_methods()]
    if start_method is None:
        return available[0]
    if start_method not in available:
        raise ValueError(f"The start method of processes must be one of {available}, got {start_method!r}.")
    return start_method


def exit_without_main_guard() -> None:
    """
    To be called before the work that processes are started for. A child process that imports a main script without a guard
    would do that work again: it exits instead, with a code that tells the parent why.
    """
    if getattr(mp.current_process(), "_inheriting", False):
        os._exit(NO_MAIN_GUARD)


def process_context(start_method: str | None = None) -> BaseContext:
    """
    :param start_method: see :func:`check_start_method`
    :return: what processes are started with
    """
    context = mp.get_context(check_start_method(start_method))
    if context.get_start_method() == "forkserver":
        # The server imports torch once, so that further processes start in a moment. No effect once the server runs.
        context.set_forkserver_preload([__name__])
    return context


class RemoteTraceback(Exception):
    """
    The traceback of another process, as the cause of the exception that it ended in.

    :param text: the traceback
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"in another process:\n\n{self.text}"


class Ready(NamedTuple):
    """Message of a worker that it has started."""


class Failure(NamedTuple):
    """
    Message of a worker that it ended in an exception.

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
            # Some exceptions can be pickled, but not put together again
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
    :return: whether it says that there is no memory left; torch has no type of its own for that of the CPU
    """
    return isinstance(error, (MemoryError, th.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _exit_with_parent() -> None:
    """Also when the main process was killed, and while this one is busy."""
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run(target: Callable[..., None], connection: Connection, args: tuple[Any, ...]) -> None:
    """
    What a worker process runs. An exception is sent to the main process as a :class:`Failure`. A process that ran out of
    memory ends, as if the system had killed it.

    :param target: takes the connection and the arguments
    :param connection: to the main process
    :param args: the arguments
    """
    # Ctrl-C reaches every process of the terminal; the main process ends the others
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
        # The main process did
        sys.exit(1)


class SharedBytes:
    """
    Bytes in shared memory, for what is too large for the pipe that a process is started through: the interpreter would wait
    for ever for a process that died before it read all.

    :param data: the bytes
    """

    def __init__(self, data: bytes):
        self.size = len(data)
        self.arena = Arena(self.size)
        self.arena.buffer[: self.size] = data

    def load(self) -> Any:
        """
        :return: what the bytes are the pickle of
        """
        return cloudpickle.loads(self.arena.buffer[: self.size])


class Worker:
    """
    A process and a connection to it.

    :param context: of :func:`process_context`
    :param target: a function of a module, which takes the connection and the arguments
    :param args: what it takes; small things and shared memory
    :param name: name of the process
    :raises RuntimeError: when the process cannot be started
    """

    def __init__(self, context: BaseContext, target: Callable[..., None], args: tuple[Any, ...], name: str):
        exit_without_main_guard()
        self.connection, child_connection = context.Pipe()
        # Daemons: the interpreter ends them when it ends without having closed them
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
        :return: of a process that is about to end or ended; negative after a signal, ``None`` if it goes on
        """
        self.process.join(GRACE_SECONDS)
        return self.process.exitcode

    def close(self, grace_seconds: float = 0.0) -> None:
        """
        End the process, and wait for that. Calling it again does nothing.

        :param grace_seconds: how long it may take to end by itself
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
