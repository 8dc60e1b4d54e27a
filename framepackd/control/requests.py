"""Hands requests of other commands to the daemon's loop, which alone changes anything."""

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from framepackd.jobs.database import StoreError

log = logging.getLogger(__name__)

WAIT_SECONDS = 8.0  # for the loop to come to a request; who asked waits longer


class Requests:
    """Threads that talk to commands put requests in; the loop answers them one by one."""

    def __init__(self, nudge: Callable[[], None]) -> None:
        """Have none yet; ``nudge`` has the loop go round."""
        self._nudge = nudge
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]] = queue.SimpleQueue()

    def ask(self, request: dict[str, Any]) -> Any:
        """Hand a request to the loop and wait for its answer."""
        answer: Future[Any] = Future()
        self._waiting.put((request, answer))
        self._nudge()
        try:
            return answer.result(WAIT_SECONDS)
        except TimeoutError:
            then = "nothing was changed: try again" if answer.cancel() else "it is still at it"
            return {"error": f"it is busy: {then}"}

    def empty(self) -> bool:
        """Whether nobody waits for the loop."""
        return self._waiting.empty()

    def answer_next(self, perform: Callable[[dict[str, Any]], Any]) -> None:
        """Do what is asked for longest, unless nobody waits for it any more.

        Raises:
            StoreError: the database cannot be used; who asked is told, too.
        """
        request, answer = self._waiting.get()
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(perform(request))
        except Exception as error:
            answer.set_exception(error)
            if isinstance(error, StoreError):
                raise
            log.exception("%s could not be done", request.get("command"))
