"""A background thread that saves and encodes while the sampling goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Beside:
    """One piece of work at a time; what goes wrong in it is told to whoever waits for it."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._at_hand: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, once the one before is done; raises what that one raised."""
        self.wait()
        self._at_hand = self._thread.submit(work)

    def wait(self) -> None:
        """Return when nothing is being done; raises, once, what the work raised."""
        at_hand, self._at_hand = self._at_hand, None
        if at_hand is not None:
            at_hand.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let what is at hand come to its end, whatever went wrong elsewhere."""
        self._thread.shutdown()
