"""Writes the video of one job in a thread of the worker, while the device computes the next one."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from framepackd.worker.messages import Message, StepDone, Written

# Messages that wait to be sent, with parts of files of 512 KiB: the checkpoint of one step. If the way is
# slower than the device, the device waits: what has not arrived is computed again after a crash.
BEHIND = 32


class SharedConnection:
    """The connection to the daemon, on which two threads may send."""

    def __init__(self, connection: Connection) -> None:
        """Share a connection; only one thread may receive."""
        self._connection = connection
        self._sending = threading.Lock()
        self._behind: queue.Queue[Any] | None = None
        self._step = threading.Semaphore()  # to have a step behind: one may be
        self._error: Exception | None = None  # why nothing more can be sent behind
        self.poll, self.recv = connection.poll, connection.recv

    def send_behind(self) -> None:
        """Send in a thread of its own from now on: the device computes while what was written travels."""
        if self._behind is None:
            self._behind = queue.Queue(BEHIND)
            threading.Thread(target=self._send_on, args=(self._behind,), daemon=True).start()

    def send(self, message: Any) -> None:
        """Send a whole message; behind, it is on its way when this returns, after all before it.

        Waits while the step before is behind: of what a crash leaves unsent, only one has to be repeated.

        Raises:
            OSError: the other end is gone.
        """
        if self._error is not None:
            raise self._error
        if self._behind is not None:
            if isinstance(message, StepDone):
                self._step.acquire()
            self._behind.put(message)
            return
        with self._sending:
            self._connection.send(message)

    def flush(self) -> None:
        """Wait until all is sent, or the other end is gone."""
        if self._behind is not None:
            self._behind.join()

    def _send_on(self, behind: "queue.Queue[Any]") -> None:
        while True:
            message = behind.get()
            if self._error is None:
                try:
                    self._connection.send(message)
                except Exception as error:
                    self._error = error
            if isinstance(message, StepDone):
                self._step.release()
            behind.task_done()


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
