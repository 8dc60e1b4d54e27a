"""Listens for bridges on a Unix socket, and starts a link process for each connection."""

import logging
import os
import pwd
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

WAITING = 2  # links: a daemon that starts asks for the list of machines, and then for a card
AGAIN_SECONDS = (
    5.0  # after one that waited has ended, which may be for good, until another one starts to wait
)
_CREDENTIALS = struct.Struct("3i")  # pid, uid and gid of who has connected: struct ucred
NODE_END = "framepackd.cluster.node"  # the module that speaks to a bridge on the node


class Bridges:
    """The door for the daemon of this machine: each connection gets a link of its own."""

    def __init__(
        self, path: Path, allowed: frozenset[int], head: str, folder: Path, environment: Mapping[str, str]
    ) -> None:
        """Listen.

        Args:
            path: of the Unix socket
            allowed: user ids that may connect beside this process's own and root
            head: address and port of Ray's head
            folder: Ray's, on this machine
            environment: what links get beside this process's own

        Raises:
            OSError: the socket cannot be made there.
        """
        self._allowed = {0, os.geteuid(), *allowed}
        self._head, self._folder, self._environment = head, folder, environment
        self._links: list[subprocess.Popen[bytes]] = []
        self._waiting: list[_Waiting] = []
        self._next = 0.0  # when another link may start to wait, on the monotonic clock
        aside = path.with_name(f".{path.name}")
        aside.unlink(missing_ok=True)
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(str(aside))
        aside.chmod(0o666)  # user ids are checked instead: the daemon's user shares no group with this one
        self._door.listen(64)
        aside.rename(path)  # whoever finds it may connect

    def round(self, seconds: float, *, ray_runs: bool = True) -> None:
        """Wait so long for a connection, and start a link for it; others wait ready where Ray runs."""
        self._links = [link for link in self._links if link.poll() is None]
        if ray_runs:
            self._have_some_wait(time.monotonic())
        self._door.settimeout(seconds)
        try:
            accepted, _ = self._door.accept()
        except TimeoutError:
            return
        with accepted:
            accepted.settimeout(None)
            user = user_of(accepted)
            if user not in self._allowed:
                log.warning(
                    "user %s connected and was sent away: front_user of [cluster] names who may", user
                )
                return
            self._give(accepted)

    def _have_some_wait(self, now: float) -> None:
        ended = [link for link in self._waiting if link.process.poll() is not None]
        for link in ended:
            link.end()
            self._waiting.remove(link)
        self._next = now + AGAIN_SECONDS if ended else self._next
        while len(self._waiting) < WAITING and now >= self._next:
            self._waiting.append(self._start())

    def _give(self, accepted: socket.socket) -> None:
        """Give a connection to a link that waits, or to a new one."""
        while True:
            link = self._waiting.pop(0) if self._waiting else self._start()
            try:
                link.give(accepted)
            except OSError:  # it has just ended
                link.end()
            else:
                self._links.append(link.process)
                return

    def _end_waiting(self) -> None:
        while self._waiting:
            self._waiting.pop().end()

    def end_links(self) -> None:
        """End all links: what they spoke to is gone, which they would notice late."""
        self._end_waiting()
        for link in self._links:
            link.kill()
            link.wait()

    def close(self) -> None:
        """End all links and listen no more."""
        self._door.close()
        self.end_links()

    def _start(self) -> "_Waiting":
        ours, theirs = socket.socketpair()
        words = [str(theirs.fileno()), self._head, str(self._folder), NODE_END, str(os.getpid())]
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - all from here
                [sys.executable, "-P", "-m", "framepackd.cluster.link", *words],
                env={**os.environ, **self._environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # Ray's own words about nodes that come and go: the bridge is told
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
        return _Waiting(process, ours)


@dataclass(frozen=True)
class _Waiting:
    """A link that has no connection yet, and the socket over which it is given one."""

    process: "subprocess.Popen[bytes]"
    way: socket.socket

    def give(self, accepted: socket.socket) -> None:
        """Give it a connection.

        Raises:
            OSError: it has ended.
        """
        socket.send_fds(self.way, [b"c"], [accepted.fileno()])
        self.way.close()

    def end(self) -> None:
        """End it."""
        self.way.close()
        self.process.kill()
        self.process.wait()


def user_of(connected: socket.socket) -> int:
    """Give the user id of the process at the other end of a Unix socket."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(raw)[1]
    return user


def user_ids(name: str) -> frozenset[int]:
    """Give the id of a user, as a set that is empty where there is none of this name."""
    try:
        return frozenset({pwd.getpwnam(name).pw_uid})
    except KeyError:
        return frozenset()
