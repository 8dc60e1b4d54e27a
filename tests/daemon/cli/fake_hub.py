"""A hub on this machine: the part of the Hugging Face hub's protocol that fetches models."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlparse

COMMIT = "0123456789" * 4


@dataclass
class FakeHub:
    """Serves the files of folders as repositories, safetensors as LFS files; may break connections off."""

    repositories: dict[str, Path]
    break_off: dict[str, int] = field(default_factory=dict)  # file name -> after so many bytes, once
    hang: dict[str, int] = field(default_factory=dict)  # likewise, always, and then nothing comes
    fetched: list[str] = field(default_factory=list)  # "path" or "path from BYTE"
    hanging: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 - the base class's name

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlparse(request.path).path)
        if path.startswith("/api/models/"):
            owner, name, what = path.removeprefix("/api/models/").split("/")[:3]
            folder = self.repositories.get(f"{owner}/{name}")
            if folder is None:
                _say(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif what == "tree":
                _say(request, 200, json.dumps(_tree(folder)).encode())
            else:
                siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in _tree(folder)]
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                _say(request, 200, json.dumps(info).encode())
            return
        if "/resolve/" not in path:  # the client counts its users
            _say(request, 404, b"{}")
            return
        owner, name, _, _, file = path.removeprefix("/").split("/", 4)
        self._send(request, self.repositories[f"{owner}/{name}"] / file, file)

    def _send(self, request: BaseHTTPRequestHandler, file: Path, name: str) -> None:
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(file)}"', "Accept-Ranges": "bytes"}
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if request.command == "GET":
            self.fetched.append(f"{name} from {start}" if start else name)
        limit = self.break_off.pop(file.name, None) if request.command == "GET" else None
        if file.name in self.hang:
            limit = self.hang[file.name]
        sent = content[start:] if limit is None else content[start : start + limit]
        _say(request, 206 if start else 200, sent, headers, length=len(content) - start)
        if limit is not None and request.command == "GET":
            if file.name in self.hang:
                self.hanging.set()
                threading.Event().wait(60)
            request.close_connection = True


def etag(file: Path) -> str:
    """Give the hub's hash of a file: SHA-256 in LFS, else git's SHA-1."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _tree(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": etag(path)[:40],
        }
        for path in files
    ]
    for path, entry in zip(files, entries, strict=True):
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": etag(path), "size": entry["size"], "pointerSize": 134}
    return entries


def _say(
    request: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: dict[str, str] | None = None,
    length: int | None = None,
) -> None:
    request.send_response(status)
    for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)
        request.wfile.flush()
