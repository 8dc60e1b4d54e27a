"""Runs what may hang, such as calls to a disk, in a thread of its own: the main loop never waits."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

SILENT_SECONDS = 60.0  # without an answer; then status says so
Made = TypeVar("Made")


class Apart(Generic[Made]):
    """One task at a time, in a daemon thread: a disk that never answers keeps no process from ending."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        """Begin nothing yet; ``wake`` is called, from the thread, when a task is done."""
        self._name = name
        self._wake = wake
        self._outcome: Future[Made] | None = None
        self._begun = 0.0

    @property
    def busy(self) -> bool:
        """Whether a task was begun whose outcome nobody has taken yet."""
        return self._outcome is not None

    @property
    def seconds(self) -> float:
        """How long the task has been under way; 0 when there is none, or it is done."""
        under_way = self._outcome is not None and not self._outcome.done()
        return time.monotonic() - self._begun if under_way else 0.0

    def begin(self, task: Callable[[], Made]) -> None:
        """Begin a task; no other may be under way."""
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
        """Give the outcome of a task that is done, once.

        Raises:
            Exception: whatever the task raised.
        """
        assert self._outcome is not None
        outcome, self._outcome = self._outcome, None
        return outcome.result(0)


_asked: dict[str, Apart[object]] = {}


def within(seconds: float, key: str, task: Callable[[], Made], otherwise: Made) -> Made:
    """Give what a task returns, or something else if that takes longer.

    While a task of this ``key`` is under way, no other of it is begun: for a disk that hangs, one waits.

    Raises:
        Exception: whatever the task raised.
    """
    apart: Apart[object] = _asked.setdefault(key, Apart(key, lambda: None))
    if apart.busy:
        if not apart.is_done():
            return otherwise
        apart = _asked[key] = Apart(key, lambda: None)  # what came of the one before is old by now
    apart.begin(task)
    if not apart.is_done(seconds):
        return otherwise
    return apart.take()  # type: ignore[return-value] # of this very task
