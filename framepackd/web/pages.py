"""Draws the pages: tonight, results, one result, and make."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from framepack_core import __version__
from framepackd.control import client
from framepackd.web import fragments, results
from framepackd.web.actions import Actions
from framepackd.web.events import Watch
from framepackd.web.make import Make
from framepackd.web.media import Media
from framepackd.web.missing import Missing
from framepackd.web.rendering import render
from framepackd.web.site import LOGIN_PAGE, Gradio, Shared, Site, login_page

THEMES = ("light", "dark")


class Pages:
    """Answers with whole pages; each works without scripts."""

    def __init__(self, shared: Shared) -> None:
        """Show what a configuration's daemon does."""
        self._shared = shared

    async def tonight(self, request: Request) -> Response:
        """Show what is made, what is next, and what needs a word."""
        shown = await self.common(request, "tonight")
        night = shown["night"]
        new = not (night.count or night.needs or night.paused or shown["fresh"])
        return _page("hello.html" if new else "tonight.html", shown)

    async def results(self, request: Request) -> Response:
        """Show what has been made."""
        return await results.gallery_page(self._shared, request, await self.common(request, "results"))

    async def result(self, request: Request) -> Response:
        """Show one result whole."""
        found = await asyncio.to_thread(results.result_context, self._shared, request.path_params["job"])
        common = await self.common(request, "result")
        if found is None:
            return _page("gone.html", common, 404)
        return _page("result.html", common | found)

    async def common(self, request: Request, page: str) -> dict[str, Any]:
        """Give what every page shows."""
        report, _ = await asyncio.to_thread(client.report, self._shared.config)
        shown = await asyncio.to_thread(fragments.context, report, self._shared)
        theme = request.cookies.get("theme", "")
        return shown | {
            "page": page,
            "theme": theme if theme in THEMES else "",
            "said": self._shared.said.pop(request.query_params.get("said", ""), ""),
            "release": __version__,
            "settle": f"{self._shared.config.settle_seconds:g}",
        }


def _page(template: str, shown: dict[str, Any], status: int = 200) -> Response:
    return HTMLResponse(render(template, **shown), status, headers={"cache-control": "no-store"})


async def static(request: Request) -> Response:
    """Give one of the page's own files."""
    answer = await _FILES.get_response(request.path_params["name"], request.scope)
    if "v" in request.query_params:
        answer.headers["cache-control"] = "public, max-age=31536000, immutable"
    return answer


_FILES = StaticFiles(packages=[("framepackd.web", "static")])


def make_site(behind: ASGIApp, gradio: Gradio, shared: Shared, watch: Watch) -> Site:
    """Put the pages before gradio."""
    pages, media, actions = Pages(shared), Media(shared), Actions(shared, watch)
    make = Make(shared, actions, pages.common)
    routes = [
        Route("/", pages.tonight),
        Route(LOGIN_PAGE, login_page),
        Route("/page/static/{name}", static),
        Route("/page/events", watch.answer),
        Route("/page/do/{what}", actions.answer, methods=["POST"]),
        Route("/page/jobs/{job}/{name:str}.live", media.preview),
        Route("/page/jobs/{job}/thumbnail", media.thumbnail),
        Route("/page/waiting", media.waiting),
        Route("/page/missing/upload", Missing(shared, actions).upload, methods=["POST"]),
        Route("/make", make.page),
        Route("/make/estimate", make.estimate, methods=["POST"]),
        Route("/make/upload", make.upload, methods=["POST"]),
        Route("/results", pages.results),
        Route("/results/{job}", pages.result),
        Route("/results/{job}/{file}", media.result),
        Route("/outbox/{path:path}", media.outbox),
    ]
    return Site(behind, gradio, routes)
