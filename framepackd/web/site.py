"""The page's own addresses, served before gradio's: everything else, its API, goes on to gradio."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from framepackd.settings.config import Config
from framepackd.web.gallery import Gallery
from framepackd.web.rendering import render

# Nothing comes from elsewhere and no script stands in a page, whatever a name or a prompt might hold.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "same-origin"}
LOGIN_PAGE = "/page/login"
OPEN = ("/page/static/", LOGIN_PAGE)  # what is there before the password
KEPT_WORDS = 100  # that a page shows after it was reloaded


class Gradio(Protocol):
    """What is asked of gradio's app: who has logged in."""

    auth: Any
    tokens: dict[Any, Any]
    cookie_id: str


@dataclass
class Shared:
    """What all pages of this process share."""

    config: Config
    private: Path  # a folder of this process
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))  # that forms carry
    gallery: Gallery = field(init=False)
    said: dict[str, str] = field(default_factory=dict)  # by a number, for the page that is shown next

    def __post_init__(self) -> None:
        """Look at nothing yet."""
        self.gallery = Gallery(self.config.outbox)

    def keep(self, words: str) -> str:
        """Keep words for the page that is shown next; gives the number to ask for them by."""
        number = secrets.token_urlsafe(9)
        self.said[number] = words
        while len(self.said) > KEPT_WORDS:
            del self.said[next(iter(self.said))]
        return number


class Site:
    """Answers what is the page's, to those who may see it."""

    def __init__(self, behind: ASGIApp, gradio: Gradio, routes: list[Route]) -> None:
        """Take gradio's API, its app, and the page's routes."""
        self._behind = behind
        self._gradio = gradio
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have gradio answer."""
        if scope["type"] != "http":
            await self._behind(scope, receive, send)
            return
        if scope["path"].rstrip("/") == "/login" and scope["method"] == "POST" and _is_browser(scope):
            await self._log_in(scope, receive, send)
            return
        route, inner = self._find(scope)
        if route is None:
            await self._behind(scope, receive, send)
        elif not scope["path"].startswith(OPEN) and not self._knows(scope):
            await self._refuse(scope)(scope, receive, send)
        else:
            try:
                await route.handle({**scope, **inner}, receive, _with_headers(send))
            except (HTTPException, MultiPartException) as error:  # a form that is none
                text = error.detail if isinstance(error, HTTPException) else error.message
                answer = Response(f"{text}\n", getattr(error, "status_code", 400), HEADERS, "text/plain")
                await answer(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[Route | None, Mapping[str, Any]]:
        other_method: tuple[Route | None, Mapping[str, Any]] = (None, {})
        for route in self._routes:
            match, inner = route.matches(scope)
            if match is Match.FULL:
                return route, inner
            if match is Match.PARTIAL and other_method[0] is None:
                other_method = route, inner
        return other_method

    def _knows(self, scope: Scope) -> bool:
        """Say whether who asks has given the password, if there is one."""
        if self._gradio.auth is None:
            return True
        cookies = _cookies(scope)
        name = f"access-token-{self._gradio.cookie_id}"
        token = cookies.get(name) or cookies.get(name.replace("token-", "token-unsecure-", 1))
        return token is not None and token in self._gradio.tokens

    def _refuse(self, scope: Scope) -> Response:
        if scope["method"] in ("GET", "HEAD") and _is_browser(scope, whatever=True):
            return RedirectResponse(LOGIN_PAGE, 303, HEADERS)
        return Response("Log in first.\n", 401, HEADERS, "text/plain")

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have gradio look at a password, and answer a person with a page instead of JSON."""
        start: Message = {}

        async def answer(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            elif not message.get("more_body", False):
                await self._logged_in(start)(scope, receive, send)

        await self._behind(scope, receive, answer)

    def _logged_in(self, start: Message) -> Response:
        if start["status"] >= 400:
            return HTMLResponse(render("login.html", wrong=True), start["status"], HEADERS)
        response = RedirectResponse("/", 303, HEADERS)
        response.raw_headers += [pair for pair in start.get("headers", ()) if pair[0] == b"set-cookie"]
        return response


def _is_browser(scope: Scope, *, whatever: bool = False) -> bool:
    """Say whether somebody asks for a page; ``whatever``: or does not say for what."""
    accepted = [value for key, value in scope["headers"] if key == b"accept"]
    return any(b"text/html" in value for value in accepted) or (whatever and not accepted)


def _cookies(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in scope["headers"]:
        if key == b"cookie":
            for part in value.decode("latin-1").split(";"):
                name, _, text = part.strip().partition("=")
                found.setdefault(name, text)
    return found


def _with_headers(send: Send) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            said = dict(message.get("headers", ()))
            usual = {key.encode(): value.encode() for key, value in HEADERS.items()}
            missing = [(key, value) for key, value in usual.items() if key not in said]
            message = {**message, "headers": [*message.get("headers", ()), *missing]}
        await send(message)

    return marked


def login_page(request: Request) -> Response:
    """Ask for the password."""
    return HTMLResponse(render("login.html", wrong=False))
