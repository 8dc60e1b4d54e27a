"""The Ray actor on a node: relays frames to the node's end of a card, and starts that. Imports little."""

import json
import os
import socket
import subprocess
import sys

from framepackd.cluster.wire import Wire, packed

# The environment that `framepackd node` had, as JSON: Ray gives actors another one, which hides cards.
ENVIRONMENT = "FRAMEPACKD_NODE_ENVIRONMENT"
SILENT_SECONDS = 1.0  # after that a call returns without a frame
ENOUGH_BYTES = 1 << 20  # frames that are there are given together up to about so many
END_SECONDS = 10.0  # that the node's end has to end by itself once nobody speaks to it


class Relay:
    """Relays whole frames, both ways, between a link and the process that it starts for a card."""

    def __init__(self, device: str, module: str) -> None:
        """Start ``python -m MODULE FD DEVICE`` with a socket's end as FD."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - all from here
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), device],
                env=environment_before_ray(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._wire = Wire(ours)
        self._ended = False

    def give(self, frames: bytes) -> None:
        """Send frames on; waits while the node's end does not read."""
        try:
            self._wire.send_packed(frames)
        except OSError:  # the node's end is gone, which take says
            return

    def take(self) -> bytes:
        """Give frames that came, or none after a second; the last one says how the node's end ended."""
        if self._ended:
            return b""
        frames = bytearray()
        try:
            while len(frames) < ENOUGH_BYTES:
                frame = self._wire.receive_packed(0.0 if frames else SILENT_SECONDS)
                if frame is None:
                    break
                frames += frame
        except EOFError:
            self._ended = True
            self._wire.close()
            frames += packed({"kind": "Lost", "reason": self._manner_of_end()})
        return bytes(frames)

    def sign(self) -> None:
        """Return: a sign of life, also while frames are under way."""

    def _manner_of_end(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "the process for the card closed its connection and did not end"
        return f"the process for the card ended with exit code {code}"


def environment_before_ray() -> dict[str, str]:
    """Give the environment that ``framepackd node`` was started with, and what it says about this machine."""
    before: dict[str, str] = json.loads(os.environ[ENVIRONMENT])
    return before
