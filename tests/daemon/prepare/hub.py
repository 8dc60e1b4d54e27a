"""A hub of our own: as much of the Hugging Face hub's protocol as pushing a data set takes."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlparse

COMMIT = "0123456789" * 4
TOKEN = "hf_right"  # noqa: S105 - opens nothing


class Hub:
    """Serves on localhost; knows one token."""

    def __init__(self, token: str = TOKEN) -> None:
        self.token = token
        self.created: list[dict[str, Any]] = []  # what was asked for
        self.files: dict[str, bytes] = {}  # committed, by path
        self.uploaded: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlparse(self.path).path
                hub.asked.append(f"{self.command} {path}")
                status, answer, error = hub.answer(
                    self.command, path, body, self.headers.get("Authorization", "")
                )
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if error:
                    self.send_header("X-Error-Code", error)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815 - the base class's names

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, command: str, path: str, body: bytes, authorization: str) -> tuple[int, Any, str]:
        """Give the status, the content and the hub's own code for the error."""
        if command == "PUT" and path.startswith("/upload/"):  # the address itself is the right to do so
            self.uploaded[path.rpartition("/")[2]] = body
            return 200, {}, ""
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}, ""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.address}/datasets/me/cats", "name": "me/cats"}, ""
        if not self.created:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        if path.endswith("/objects/batch"):
            return (
                200,
                {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]},
                "",
            )
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [self._mode(file["path"]) for file in files]}, ""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, ""
        if "/commit/" in path:
            for line in body.splitlines():
                self._commit(json.loads(line))
            commit = f"{self.address}/datasets/me/cats/commit/{COMMIT}"
            return 200, {"success": True, "commitUrl": commit, "commitOid": COMMIT}, ""
        if "/paths-info/" in path:  # there are no files yet
            return 200, [], ""
        if path.partition("/revision/")[0] == "/api/datasets/me/cats":
            return 200, {"id": "me/cats", "sha": COMMIT, "private": True, "siblings": [], "tags": []}, ""
        return 404, {"error": "Entry not found"}, "EntryNotFound"

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/upload/{wanted['oid']}"}}}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".parquet") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, operation: dict[str, Any]) -> None:
        value = operation["value"]
        if operation["key"] == "lfsFile":
            self.files[value["path"]] = self.uploaded[value["oid"]]
        elif operation["key"] == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
