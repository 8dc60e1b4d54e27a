"""Does in a thread of its own what may hang: the loop goes round, whatever a file system does."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Apart(Generic[Made]):
    """One thing at a time, in a daemon thread: a disk that never answers keeps no process from ending."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        """Begin nothing yet; ``wake`` is called, from the thread, when something is done."""
        self._name = name
        self._wake = wake
        self._outcome: Future[Made] | None = None
        self._begun = 0.0

    @property
    def busy(self) -> bool:
        """Whether something was begun and its outcome not taken yet."""
        return self._outcome is not None

    @property
    def seconds(self) -> float:
        """How long what was begun has been under way; 0 when nothing is, or it is done."""
        under_way = self._outcome is not None and not self._outcome.done()
        return time.monotonic() - self._begun if under_way else 0.0

    def begin(self, task: Callable[[], Made]) -> None:
        """Begin something; nothing else may be under way."""
        assert self._outcome is None, f"{self._name} is at something else"
        outcome: Future[Made] = Future()

        def do() -> None:
            try:
                outcome.set_result(task())
            except BaseException as error:
                outcome.set_exception(error)
            self._wake()

        self._outcome, self._begun = outcome, time.monotonic()
        threading.Thread(target=do, name=self._name, daemon=True).start()

    def take(self, patience: float = 0.0) -> Made | None:
        """Give what came of it, once; None if it is not done within ``patience`` seconds.

        Raises:
            Exception: whatever the task raised.
        """
        if self._outcome is None:
            return None
        try:
            self._outcome.exception(patience)
        except NotYet:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome.result()
