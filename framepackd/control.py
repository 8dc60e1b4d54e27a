"""One daemon a state folder, and a socket to ask it: the lock, the server, the client."""

import errno
import fcntl
import json
import os
import pwd
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LOCK = "lock"
SOCKET = "control.sock"
LOCK_RETRY_SECONDS = 1.0  # somebody who only looks holds the lock for a moment
ANSWER_SECONDS = 10.0
MAX_REQUEST_BYTES = 1 << 20


class AlreadyRunningError(Exception):
    """Another daemon holds the state folder."""


class Lock:
    """The right to write in a state folder; the kernel takes it back when the process dies."""

    def __init__(self, state_dir: Path, *, waiting: Callable[[int], None] | None = None) -> None:
        """Take it, or say who has it.

        A daemon that was killed in the middle of a call to a disk that hangs keeps the lock until that call
        returns. With ``waiting`` such a predecessor is waited for, however long: ``waiting`` is called about
        every second with its process id.

        Raises:
            AlreadyRunningError: another process holds it.
        """
        self._file = _open_lock(state_dir / LOCK)
        deadline = time.monotonic() + LOCK_RETRY_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    raise
                pid = holder(state_dir)
                if time.monotonic() > deadline:
                    if waiting is None or pid is None or not _is_on_its_way_out(pid):
                        raise AlreadyRunningError(
                            f"a framepackd (pid {pid or 'unknown'}) runs on {state_dir} already: "
                            "stop it first, or set another state_dir"
                        ) from error
                    waiting(pid)
                    deadline = time.monotonic() + LOCK_RETRY_SECONDS
                time.sleep(0.05)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Give it back."""
        self._file.truncate(0)
        self._file.close()


def _open_lock(path: Path) -> TextIO:
    """Open the lock, for this user alone: who can open it can hold it, and stop the service with that."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+")


def _owner(state_dir: Path) -> str:
    user = state_dir.stat().st_uid
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"'#{user}'"  # as sudo takes a number


def is_held(state_dir: Path) -> bool:
    """Say whether a daemon holds the state folder.

    Raises:
        OSError: it cannot be told.
    """
    try:
        with (state_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        owner = _owner(state_dir)
        raise PermissionError(
            f"only {owner} and root may ask: put sudo -u {owner} before the command"
        ) from error
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return True
        raise
    return False


def holder(state_dir: Path) -> int | None:
    """Give the process id that a daemon wrote into its lock."""
    try:
        return int((state_dir / LOCK).read_text())
    except (OSError, ValueError):
        return None


def _is_on_its_way_out(pid: int) -> bool:
    """Say whether a process has been killed and cannot end yet, or is one that systemd has replaced by us."""
    process = Path(f"/proc/{pid}")
    try:
        if any(map(_is_killed, process.glob("task/*/status"))):
            return True
        # A service has one daemon: in our own control group another one is what is left of the last.
        ours = Path("/proc/self/cgroup").read_text()
        return bool(os.environ.get("NOTIFY_SOCKET")) and (process / "cgroup").read_text() == ours
    except OSError:  # it has ended meanwhile
        return True


def _is_killed(status: Path) -> bool:
    """Look into /proc: has this thread ended, or does SIGKILL wait until a call of it returns?"""
    facts = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
    pending = int(facts["SigPnd"], 16) | int(facts["ShdPnd"], 16)
    return facts["State"][0] in "ZX" or bool(pending >> (signal.SIGKILL - 1) & 1)


class _Handler(socketserver.StreamRequestHandler):
    """One line of JSON in, one out."""

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
    """Answer requests on the socket, in threads, inside the block; only for the holder of the lock."""
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
    """Ask the daemon.

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
    """Give the socket's path by way of the folder's descriptor: a socket's path has room for 108 bytes."""
    descriptor = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
