"""Runs calls that may hang, as to a disk, in threads: the main loop never waits for them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

SILENT_SECONDS = 60.0  # without an answer; then status reports it
Made = TypeVar("Made")


class Apart(Generic[Made]):
    """One task at a time, in a daemon thread: a disk that never answers stops no process from ending."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        """Begin nothing yet; ``wake`` is called, from the thread, when a task is done."""
        self._name = name
        self._wake = wake
        self._outcome: Future[Made] | None = None
        self._begun = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is a task whose outcome was not taken yet."""
        return self._outcome is not None

    @property
    def seconds(self) -> float:
        """How long the task has been running; 0 if none is."""
        under_way = self._outcome is not None and not self._outcome.done()
        return time.monotonic() - self._begun if under_way else 0.0

    def begin(self, task: Callable[[], Made]) -> None:
        """Begin a task; no other may be running, or wait to be taken."""
        assert self._outcome is None, f"{self._name} is at another task"
        outcome: Future[Made] = Future()

        def do() -> None:
            try:
                outcome.set_result(task())
            except BaseException as error:
                outcome.set_exception(error)  # raised where the outcome is taken
            self._wake()

        self._outcome, self._begun = outcome, time.monotonic()
        threading.Thread(target=do, name=self._name, daemon=True).start()

    def is_done(self, patience: float = 0.0) -> bool:
        """Say whether there is an outcome to take; waits for one up to ``patience`` seconds."""
        if self._outcome is None:
            return False
        try:
            self._outcome.exception(patience)
        except NotYet:
            return False
        return True

    def take(self) -> Made:
        """Give the outcome of a finished task, once.

        Raises:
            Exception: whatever the task raised.
        """
        assert self._outcome is not None
        outcome, self._outcome = self._outcome, None
        return outcome.result(0)


_asked: dict[str, Apart[object]] = {}


def within(seconds: float, key: str, task: Callable[[], Made], otherwise: Made) -> Made:
    """Give what a task returns, or ``otherwise`` if that takes longer.

    One task of a ``key`` runs at a time: a disk that hangs blocks one thread, not more and more.

    Raises:
        Exception: whatever the task raised.
    """
    apart: Apart[object] = _asked.setdefault(key, Apart(key, lambda: None))
    if apart.busy:
        if not apart.is_done():
            return otherwise
        apart = _asked[key] = Apart(key, lambda: None)  # the outcome of the last task is out of date
    apart.begin(task)
    if not apart.is_done(seconds):
        return otherwise
    return apart.take()  # type: ignore[return-value] # of this task
