"""Serves pictures and videos of jobs and results: what they name, never a path that is asked for."""

import asyncio
import hashlib
import os
import stat
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from framepack_core.errors import RequestError
from framepackd import files
from framepackd.control import client
from framepackd.delivery import results_page
from framepackd.inbox import inspect
from framepackd.jobs.folder import INPUTS, PREVIEW
from framepackd.text import JOB_ID
from framepackd.web.site import Shared

KEPT_THUMBNAILS = 5000
FOR_EVER, NOT_KEPT = "private, max-age=31536000, immutable", "private, no-cache"
TYPES = {
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".toml": "text/plain; charset=utf-8",
}
OUTBOX = f"{results_page.POLICY}; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
MISSING = "There is no such file any more.\n"


class Media:
    """Answers for files, each found by the id of its job."""

    def __init__(self, shared: Shared) -> None:
        """Serve what belongs to the jobs and results of a configuration."""
        self._shared = shared
        self._one_prune = asyncio.Lock()

    async def preview(self, request: Request) -> Response:
        """Give the video so far, or the picture of the section that is made."""
        name = PREVIEW if request.path_params["name"] == "video" else Path(PREVIEW).with_suffix(".png").name
        job = request.path_params["job"]
        if not JOB_ID.fullmatch(job):
            return _missing()
        return _served(self._shared.config.jobs_dir / job / name, request)

    async def thumbnail(self, request: Request) -> Response:
        """Give a small picture of what a job begins with."""
        job = request.path_params["job"]
        if not JOB_ID.fullmatch(job):
            return _missing()
        picture = await asyncio.to_thread(self._picture_of, job)
        return await self._small(picture, request)

    async def waiting(self, request: Request) -> Response:
        """Give a small picture of a file that waits in the inbox, if the snapshot names it."""
        wanted = request.query_params.get("folder", ""), request.query_params.get("file", "")
        report, _ = await asyncio.to_thread(client.report, self._shared.config)
        named = {(entry["folder"], file) for entry in report["waiting"] for file in entry["files"]}
        if wanted not in named:
            return _missing()
        return await self._small(self._shared.config.inbox / wanted[0] / wanted[1], request)

    async def result(self, request: Request) -> Response:
        """Give a file of a result: its video, its record, or one of its inputs."""
        found = await asyncio.to_thread(self._shared.gallery.find, request.path_params["job"])
        name = request.path_params["file"]
        path = found.file(name) if found else None
        if path is None or found is None:
            return _missing()
        if "download" in request.query_params:
            return _served(self._shared.config.outbox / path, request, download=Path(path).name)
        return _served(self._shared.config.outbox / path, request)

    async def outbox(self, request: Request) -> Response:
        """Give the page that lies in the outbox, which runs no script, and what it shows."""
        wanted = request.path_params["path"]
        path = self._shared.config.outbox / wanted
        if results_page.is_page(wanted):
            if not await asyncio.to_thread(results_page.is_ours, path):
                return _missing()
            headers = {"cache-control": NOT_KEPT, "content-security-policy": OUTBOX}
            return FileResponse(path, headers=headers, media_type="text/html; charset=utf-8")
        found = await asyncio.to_thread(self._shared.gallery.all)
        return _served(path, request) if any(shown.owns(wanted) for shown in found) else _missing()

    def _picture_of(self, job: str) -> Path | None:
        config = self._shared.config
        found = self._shared.gallery.find(job)
        if found is not None and found.picture is not None:
            return config.outbox / found.picture
        record, _ = client.show(config, job)
        if not record or record["id"] != job:
            return None
        role = next((role for role in ("image", "frame-0") if role in record["inputs"]), None)
        file = record["inputs"][role]["file"] if role else None
        if not isinstance(file, str) or "/" in file:
            return None
        kept = config.jobs_dir / job / INPUTS / file
        return kept if kept.exists() else config.failed / record["folder"] / file

    async def _small(self, picture: Path | None, request: Request) -> Response:
        """Give a thumbnail; it is made once, by a process of its own: anybody may have made the picture."""
        if picture is None:
            return _missing()
        try:
            status = await asyncio.to_thread(picture.lstat)
        except OSError:
            return _missing()
        if not stat.S_ISREG(status.st_mode):
            return _missing()
        version = f"{picture}\0{status.st_mtime_ns}\0{status.st_size}".encode("utf-8", "surrogateescape")
        kept = self._shared.private.parent / "thumbnails"
        target = kept / f"{hashlib.sha256(version).hexdigest()[:32]}.jpg"
        if not target.exists():
            try:
                await asyncio.to_thread(_make, picture, target)
            except (RequestError, OSError):
                return _missing()
            async with self._one_prune:
                await asyncio.to_thread(_prune, target.parent)
        return _served(target, request, for_ever=True)


def _make(picture: Path, target: Path) -> None:
    files.make_folder(target.parent)
    part = target.with_name(f"{files.PART_PREFIX}{target.name}-{os.urandom(4).hex()}.part")
    try:
        inspect.make_thumbnail(picture, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    """Keep the newest thumbnails only."""
    kept = sorted(folder.glob("*.jpg"), key=lambda path: path.stat().st_mtime_ns)
    for path in kept[:-KEPT_THUMBNAILS]:
        path.unlink(missing_ok=True)


def _served(path: Path, request: Request, *, for_ever: bool = False, download: str | None = None) -> Response:
    """Give a regular file, in parts where they are asked for; what is named with its version may be kept."""
    try:
        status = path.lstat()
    except OSError:
        return _missing()
    kind = TYPES.get(path.suffix.lower())
    if kind is None or not stat.S_ISREG(status.st_mode):
        return _missing()
    kept = for_ever or "v" in request.query_params
    headers = {"cache-control": FOR_EVER if kept else NOT_KEPT}
    return FileResponse(path, headers=headers, media_type=kind, stat_result=status, filename=download)


def _missing() -> Response:
    return Response(MISSING, 404, {"cache-control": "no-store"}, "text/plain")
