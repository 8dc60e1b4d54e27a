"""Writes the video of one job in a thread of the worker, while the device computes the next one."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from framepackd.worker.messages import Message, Written


class SharedConnection:
    """The connection to the daemon, on which two threads may send."""

    def __init__(self, connection: Connection) -> None:
        """Share a connection; only one thread may receive."""
        self._connection = connection
        self._sending = threading.Lock()
        self.poll, self.recv = connection.poll, connection.recv

    def send(self, message: Any) -> None:
        """Send a whole message."""
        with self._sending:
            self._connection.send(message)


class Finishing:
    """Ends one job after the other, each when the one before has ended."""

    def __init__(self, connection: SharedConnection) -> None:
        """Begin with nothing to do."""
        self._connection = connection
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finishing")
        self._given: Callable[[], Message] | None = None
        self._task: Future[None] | None = None

    def give(self, end: Callable[[], Message]) -> None:
        """Take the end of a job, which is begun by :meth:`begin`; waits for that of the job before."""
        self.wait()
        self._given = end

    def begin(self) -> None:
        """Begin what was given: the daemon knows that the job is sampled."""
        given, self._given = self._given, None
        if given is not None:
            self._task = self._thread.submit(self._run, given)

    def wait(self) -> None:
        """Wait until the last job has ended, and the daemon was told how."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def _run(self, end: Callable[[], Message]) -> None:
        self._connection.send(Written(end()))
