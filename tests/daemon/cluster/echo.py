"""A stand-in for a node's end: greets with its environment, returns what it is sent, ends when told."""

import os
import socket
import sys

from framepackd.cluster.wire import Wire


def main() -> None:
    descriptor, device = sys.argv[1:]
    wire = Wire(socket.socket(fileno=int(descriptor)))
    wire.send({"kind": "Hello", "device": device, "environment": dict(os.environ)})
    while frame := wire.receive():
        if frame.kind == "End":
            sys.exit(7)
        wire.send(*frame)


if __name__ == "__main__":
    main()
