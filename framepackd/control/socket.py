"""The Unix socket between commands and the daemon: its server and its client."""

import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOCKET = "control.sock"
ANSWER_SECONDS = 10.0
MAX_REQUEST_BYTES = 1 << 20


class _Handler(socketserver.StreamRequestHandler):
    """Reads one line of JSON and answers with one."""

    timeout = ANSWER_SECONDS
    server: "_Server"

    def handle(self) -> None:
        try:
            line = self.rfile.readline(MAX_REQUEST_BYTES)
            answer = self.server.answer(json.loads(line)) if line.endswith(b"\n") else _cut_off(line)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def _cut_off(line: bytes) -> dict[str, str]:
    whole = f"a request may have {MAX_REQUEST_BYTES} bytes: ask for fewer jobs at once"
    return {"error": whole if len(line) == MAX_REQUEST_BYTES else "the request has no end: send a whole line"}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    answer: Callable[[Any], Any]


@contextmanager
def serve(state_dir: Path, answer: Callable[[Any], Any]) -> Iterator[None]:
    """Answer requests in threads inside the block; for the holder of the state folder's lock alone."""
    with _socket_address(state_dir) as address:
        (state_dir / SOCKET).unlink(missing_ok=True)
        with _Server(address, _Handler) as server:
            server.answer = answer
            (state_dir / SOCKET).chmod(0o600)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                (state_dir / SOCKET).unlink(missing_ok=True)


def ask(state_dir: Path, request: Any) -> Any:
    """Send a request to the daemon and give its answer.

    Raises:
        OSError: nobody answers.
    """
    with _socket_address(state_dir) as address, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(ANSWER_SECONDS)
        client.connect(address)
        client.sendall(json.dumps(request).encode() + b"\n")
        with client.makefile("rb") as answers:
            line = answers.readline()
    if not line:
        raise ConnectionResetError("the daemon closed the connection")
    return json.loads(line)


@contextmanager
def _socket_address(state_dir: Path) -> Iterator[str]:
    """Give the socket's path through the folder's descriptor: the path of a socket has room for 108 bytes."""
    descriptor = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
