"""Passes commands from the socket's threads to the daemon's loop, which alone changes jobs."""

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from framepackd.jobs.database import StoreError

log = logging.getLogger(__name__)

WAIT_SECONDS = 8.0  # for the loop to come to a request; the command that asks waits longer


class Requests:
    """A queue of requests: the socket's threads put them in, the loop answers them one by one."""

    def __init__(self, nudge: Callable[[], None]) -> None:
        """Begin empty; ``nudge`` wakes the loop."""
        self._nudge = nudge
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]] = queue.SimpleQueue()

    def ask(self, request: dict[str, Any]) -> Any:
        """Pass a request to the loop and wait for its answer."""
        answer: Future[Any] = Future()
        self._waiting.put((request, answer))
        self._nudge()
        try:
            return answer.result(WAIT_SECONDS)
        except TimeoutError:
            then = "nothing was changed: try again" if answer.cancel() else "it is still at it"
            return {"error": f"it is busy: {then}"}

    def empty(self) -> bool:
        """Whether no request waits for the loop."""
        return self._waiting.empty()

    def answer_next(self, perform: Callable[[dict[str, Any]], Any]) -> None:
        """Answer the oldest request, unless its sender has stopped waiting.

        Raises:
            StoreError: the database cannot be used; the sender gets this answer too.
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
