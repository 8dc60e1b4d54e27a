"""Tells each open page what has changed: a stream of server-sent events, each a fragment of HTML."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from framepackd.control import client
from framepackd.web import fragments
from framepackd.web.site import Shared

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks at the daemon, while anybody has the page open
BEAT_SECONDS = 15.0  # a comment at least so often: a proxy keeps the connection, and who has gone shows
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
MOST_STREAMS = 64  # each keeps a connection


class Watch:
    """Looks at the daemon while somebody has the page open, once for all of them."""

    def __init__(self, shared: Shared) -> None:
        """Look at nothing yet."""
        self._shared = shared
        self._changed: asyncio.Condition | None = None  # of the loop that serves
        self._shown: dict[str, str] = {}  # what is to be seen now, by event
        self._number = 0
        self._streams = 0
        self._looking: asyncio.Task[None] | None = None
        self._ending = False
        self._now: asyncio.Event | None = None

    def hurry(self) -> None:
        """Look at once: something was just changed."""
        if self._now is not None:
            self._now.set()

    def end(self) -> None:
        """Have all streams end: the server waits for them."""
        self._ending = True

    async def answer(self, request: Request) -> Response:
        """Open a stream."""
        if self._streams >= MOST_STREAMS:
            return Response("Too many pages are open: close some.\n", 503, {"retry-after": "30"})
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=HEADERS)

    async def _stream(self) -> AsyncIterator[str]:
        self._streams += 1
        self._begin()
        assert self._changed is not None
        seen: dict[str, str] = {}
        number, quiet = -1, 0.0
        try:
            yield "retry: 2000\n\n"
            while not self._ending:
                if number != self._number:
                    number, quiet = self._number, 0.0
                    shown = dict(self._shown)
                    for name, html in shown.items():
                        if seen.get(name) != html:
                            yield _event(name, html)
                    seen = shown
                async with self._changed:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)
                quiet += LOOK_SECONDS
                if quiet >= BEAT_SECONDS:
                    quiet = 0.0
                    yield ": still here\n\n"
        finally:
            self._streams -= 1

    def _begin(self) -> None:
        if self._changed is None:
            self._changed, self._now = asyncio.Condition(), asyncio.Event()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        assert self._changed is not None
        assert self._now is not None
        while self._streams and not self._ending:
            try:
                shown = await asyncio.to_thread(self._fragments)
            except Exception:  # whatever it is: the next look may be better
                log.exception("the page cannot be told what is new")
                shown = self._shown
            if shown != self._shown:
                self._shown, self._number = shown, self._number + 1
                async with self._changed:
                    self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), LOOK_SECONDS)
            self._now.clear()

    def _fragments(self) -> dict[str, str]:
        report, _ = client.report(self._shared.config)
        return fragments.of(report, self._shared)


def _event(name: str, html: str) -> str:
    return f"event: {name}\n{''.join(f'data: {line}' + chr(10) for line in html.splitlines())}\n"
