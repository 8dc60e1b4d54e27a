"""Listens for bridges on a Unix socket, and starts a link process for each connection."""

import logging
import os
import pwd
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

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
        aside = path.with_name(f".{path.name}")
        aside.unlink(missing_ok=True)
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(str(aside))
        aside.chmod(0o666)  # user ids are checked instead: the daemon's user shares no group with this one
        self._door.listen(64)
        aside.rename(path)  # whoever finds it may connect

    def round(self, seconds: float) -> None:
        """Wait so long for a connection, and start a link for it."""
        self._links = [link for link in self._links if link.poll() is None]
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
            self._links.append(self._start(accepted))

    def end_links(self) -> None:
        """End all links: what they spoke to is gone, which they would notice late."""
        for link in self._links:
            link.kill()
            link.wait()

    def close(self) -> None:
        """End all links and listen no more."""
        self._door.close()
        self.end_links()

    def _start(self, accepted: socket.socket) -> "subprocess.Popen[bytes]":
        words = [str(accepted.fileno()), self._head, str(self._folder), NODE_END, str(os.getpid())]
        return subprocess.Popen(  # noqa: S603 - all from here
            [sys.executable, "-P", "-m", "framepackd.cluster.link", *words],
            env={**os.environ, **self._environment},
            pass_fds=[accepted.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # Ray's own words about nodes that come and go: the bridge is told
            stderr=subprocess.DEVNULL,
            cwd="/",
        )


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
