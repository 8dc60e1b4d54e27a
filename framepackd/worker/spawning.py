"""Starts a process at the other end of a pipe, which no signal for the daemon ends."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from framepackd.worker.main import FOR_THE_DAEMON


class Spawned(NamedTuple):
    """A process, and our end of the pipe to it."""

    process: BaseProcess
    connection: Connection


def spawn(target: Callable[..., None], *arguments: Any, name: str) -> Spawned:
    """Start a process that runs ``target(connection, pid of this process, *arguments)``.

    One that calls :func:`framepackd.worker.main.die_with` ends with the thread that calls this.

    Raises:
        OSError: no process can be started.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share descriptors, and locks of threads
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, os.getpid(), *arguments), name=name)
    # Blocked signals are inherited: an early one would end a process that does not ignore them yet.
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_DAEMON)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return Spawned(process, ours)
