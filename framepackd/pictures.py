"""Dropped pictures are decoded in a process of their own, for what breaks a decoder or fills memory.

The process is started when the first picture is looked at and ends with the daemon.
"""

import atexit
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

from framepack_core.buckets import Size
from framepack_core.errors import RequestError

DECODE_SECONDS = 15  # a hundred megapixels take two
MEMORY_BYTES = 2 << 30  # address space of the process

_running: subprocess.Popen[bytes] | None = None  # one for the whole daemon, as there is one inbox


def picture_size(path: Path) -> Size:
    """Decode a picture to its end and give its height and width upright.

    Raises:
        RequestError: it cannot be used; says why and what to do.
    """
    line, code = _ask(path)
    if not line and code != -signal.SIGALRM:
        line, code = _ask(path)  # somebody else may have ended the process; a second time it is the picture
    if line:
        answer = json.loads(line)
        if "error" in answer:
            raise RequestError(answer["error"])
        height, width = answer["size"]
        return height, width
    if code == -signal.SIGALRM:
        fault = f"takes more than {DECODE_SECONDS} s to decode"
    else:
        fault = f"breaks its decoder (exit code {code})"
    raise RequestError(f"{path.name} {fault}: save it again as PNG or JPEG and drop it again")


def _ask(path: Path) -> tuple[bytes, int | None]:
    """Give what the process answers; nothing, and how it ended, if it died over it."""
    global _running
    if _running is None:
        _running = subprocess.Popen(
            [sys.executable, "-m", "framepackd.pictures"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(_end)
    assert _running.stdin is not None
    assert _running.stdout is not None
    try:
        _running.stdin.write(json.dumps(str(path)).encode() + b"\n")
        line = _running.stdout.readline()
    except BrokenPipeError:
        line = b""
    return (line, None) if line else (line, _end())


def _end() -> int | None:
    """Let the process end, and say with what exit code it did."""
    global _running
    if _running is None:
        return None
    process, _running = _running, None
    atexit.unregister(_end)
    with process:
        assert process.stdin is not None
        process.stdin.close()
    return process.returncode


def _main() -> None:
    """Answer one line with one line: a path with a size or an error."""
    from framepack_core import media

    for ignored in (signal.SIGINT, signal.SIGTERM):  # the daemon decides when this ends
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.alarm(DECODE_SECONDS)  # it ends the process, even in the middle of a decoder
        try:
            answer: dict[str, object] = {"size": media.picture_size(Path(json.loads(line)))}
        except RequestError as error:
            answer = {"error": str(error)}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
