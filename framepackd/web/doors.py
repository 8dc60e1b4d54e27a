"""Refuses requests that other sites send, that are too large, or whose files lie elsewhere."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from framepackd.web.origins import Authority, Hosts, parse_authority
from framepackd.web.passwords import Tries
from framepackd.web.uploads import UploadError, Uploads

log = logging.getLogger(__name__)

READING = ("GET", "HEAD", "OPTIONS")
OWN_SITES = ("same-origin", "none")  # none: typed in, or a bookmark. Other ports of this machine: same-site.
BODY_BYTES = 1 << 20  # of a request that is no upload: it is read whole, and searched
DRAIN_SECONDS = 10.0  # most programs read no answer before they have sent everything
POLICY_VIOLATION = 1008  # how a websocket is refused
FILE_KEYS = ("path", "url")
# What no path on this machine begins with.
ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*:|//|\\\\)", re.IGNORECASE)
WRONG_PASSWORD = (400, 401, 403)


class RefusedError(Exception):
    """A request is refused; the text tells its sender why."""

    def __init__(self, status: int, text: str, *headers: tuple[bytes, bytes], drain: bool = False) -> None:
        """Take the answer; ``drain``: receive the rest of the request, or its sender reads no answer."""
        super().__init__(text)
        self.status = status
        self.headers = headers
        self.drain = drain


class Doors:
    """Lets requests through that use a name of this server, from its page or a program, within limits."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Hosts,
        uploads: Uploads,
        tries: Tries,
        upload: str,
        login: str,
        changing: Collection[str] = (),
    ) -> None:
        """Take the app behind, and the ends of the paths that upload, log in, or change something on GET."""
        self._app = app
        self._hosts = hosts
        self._uploads = uploads
        self._tries = tries
        self._upload = upload
        self._login = login
        self._changing = changing
        self._one_login = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the app."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            host = self._host(scope)
            self._check_origin(scope, host)
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
            else:
                await self._answer(scope, host, receive, _unsniffed(send))
        except RefusedError as refused:
            await _refuse(refused, scope, receive, send)

    def _host(self, scope: Scope) -> Authority:
        given = _values(scope, b"host")
        host = parse_authority(given[0]) if len(given) == 1 else None
        if host is None or not scope["path"].startswith("/"):  # an address instead of a path names a host too
            raise RefusedError(
                403, "This server is asked by the name it has, once, and without a dot at its end."
            )
        if not self._hosts.answers(host):
            raise RefusedError(
                403,
                f"This server does not answer by the name {host.host}. If that name is meant for it, put "
                f'hosts = ["{host.host}"] under [web] in framepackd\'s configuration.',
            )
        return host

    def _check_origin(self, scope: Scope, host: Authority) -> None:
        """Refuse what other pages send.

        Reading is refused too if the request has an Origin: gradio would show the answer to many pages.
        """
        for origin in _values(scope, b"origin"):
            if not self._hosts.owns(origin, host, scope["scheme"].replace("ws", "http")):
                raise RefusedError(
                    403,
                    "This request comes from another page, which may ask for nothing here. If that is this "
                    "one behind a proxy, put the proxy's name under hosts in [web] in the configuration.",
                )
        foreign = any(site not in OWN_SITES for site in _values(scope, b"sec-fetch-site"))
        if foreign and self._is_changing(scope):
            raise RefusedError(403, "This request comes from another page, which may change nothing here.")

    def _is_changing(self, scope: Scope) -> bool:
        return (
            scope["type"] == "websocket"
            or scope["method"] not in READING
            or any(_is_at(scope, end) for end in self._changing)
        )

    async def _answer(self, scope: Scope, host: Authority, receive: Receive, send: Send) -> None:
        if "://" in scope["path"]:
            raise RefusedError(403, "Nothing is fetched from elsewhere: ask for a file of this server.")
        if scope["method"] in READING:
            await self._app(scope, receive, send)
            return
        kind = _kind(scope)
        if kind == "multipart/form-data" and _is_at(scope, self._upload):
            await self._let_upload(scope, receive, send)
            return
        body = await _read(scope, receive)
        self._refuse_addresses(body, kind, host)
        replayed = _replay(body, receive)
        if _is_at(scope, self._login):
            await self._let_log_in(scope, replayed, send)
        else:
            await self._app(scope, replayed, send)

    def _refuse_addresses(self, body: bytes, kind: str, host: Authority) -> None:
        """Refuse files that would have to be fetched, before gradio reads the body and fetches them."""

        def look(pairs: list[tuple[str, Any]]) -> None:  # also of two of one name: readers take either
            for key, value in pairs:
                if key in FILE_KEYS and isinstance(value, str) and not self._is_here(key, value, host):
                    elsewhere.append(value)

        elsewhere: list[str] = []
        if not body or kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            return
        try:
            json.loads(body, object_pairs_hook=look)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "This body is not JSON, or is nested without end.") from error
        if elsewhere:
            text = (
                f"nothing is fetched from elsewhere, such as {elsewhere[0][:100]!r}: upload the file itself"
            )
            raise RefusedError(422, _invalid(text), (b"content-type", b"application/json"))

    def _is_here(self, key: str, value: str, host: Authority) -> bool:
        if not ADDRESS.match(value):
            return True
        origin = re.match(r"https?://[^/?#\\]*(?=/)", value)
        return key == "url" and origin is not None and self._hosts.owns(origin[0], host, "http")

    async def _let_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: UploadError | None = None
        started = False

        async def counted() -> Message:
            nonlocal refused
            message = await receive()
            try:
                count(len(message.get("body", b"")))
            except UploadError as error:
                refused = error
                raise
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if refused is None:
                started = True
                await send(message)

        try:
            async with self._uploads.coming(_length(scope)) as count:
                await self._app(scope, counted, noted)
        except UploadError as error:
            refused = error
        except Exception:
            if refused is None:  # else it comes from our own
                raise
        if refused is not None and not started:
            raise RefusedError(refused.status, str(refused), drain=True)

    async def _let_log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have passwords checked one at a time: else many are tried before the first is known to be wrong."""
        address = str((scope.get("client") or ("unknown",))[0])
        async with self._one_login:
            wait = self._tries.wait(address)
            if wait:
                raise RefusedError(
                    429,
                    f"There were wrong passwords: the next is checked in {wait:.0f} s.",
                    (b"retry-after", str(int(wait) + 1).encode()),
                )
            status = 0

            async def noted(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            await self._app(scope, receive, noted)
            if status in WRONG_PASSWORD:
                count = self._tries.wrong(address)
                wait = self._tries.wait(address)
                log.warning(
                    "wrong password from %s, %d in a row: the next waits %.0f s", address, count, wait
                )
            elif status and status < 400:
                self._tries.right(address)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def _is_at(scope: Scope, end: str) -> bool:
    """Say whether a path has this end; a proxy may put anything before it."""
    return str(scope["path"]).rstrip("/").endswith(end)


def _kind(scope: Scope) -> str:
    given = _values(scope, b"content-type")
    if len(given) > 1:
        raise RefusedError(400, "This request has several content types: send one.")
    return given[0].partition(";")[0].strip().lower() if given else ""


def _length(scope: Scope) -> int:
    given = _values(scope, b"content-length")
    return int(given[0]) if given and given[0].isdecimal() and len(given[0]) < 20 else 0


async def _read(scope: Scope, receive: Receive) -> bytes:
    """Read the body of a request that is no upload."""
    body, coming, more = bytearray(), _length(scope), True
    while more:
        if max(coming, len(body)) > BODY_BYTES:
            raise RefusedError(413, f"What is no upload may have {BODY_BYTES} bytes.", drain=True)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "This request broke off.")
        body += message.get("body", b"")
        more = message.get("more_body", False) or len(body) > BODY_BYTES
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a ``receive`` that repeats a body that was read, and then goes on."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _unsniffed(send: Send) -> Send:
    """Have browsers trust the content type: a picture that holds a script stays a picture."""

    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": headers}
        await send(message)

    return marked


def _invalid(text: str) -> str:
    """Give an error of an input in the form that gradio's client and page show to people."""
    detail = {"__type__": "validate", "is_valid": False, "parameter_name": "file", "message": text}
    return json.dumps({"detail": [detail]})


async def _refuse(refused: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and close the connection: nothing else is read from it."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        return
    text = str(refused).encode("utf-8", "backslashreplace") + b"\n"
    usual = {
        b"content-type": b"text/plain; charset=utf-8",
        b"x-content-type-options": b"nosniff",
        b"content-length": str(len(text)).encode(),
        b"connection": b"close",
    }
    headers = list((usual | dict(refused.headers)).items())
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text, "more_body": True})
    if refused.drain:
        await _drain(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
