"""Tell systemd how the daemon stands (sd_notify(3))."""

import contextlib
import os
import socket


def notify(message: str) -> None:
    """Send a message, if systemd listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
        notifier.sendto(message.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
