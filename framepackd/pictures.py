"""Dropped pictures and videos are decoded in a process of their own: some break decoders or fill memory.

The process is started when the first of them is looked at and ends with the daemon.
"""

import atexit
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from framepack_core.buckets import Size
from framepack_core.continuing import REMEDY, Footage
from framepack_core.errors import RequestError

DECODE_SECONDS = 15  # a hundred megapixels take two
MEMORY_BYTES = 2 << 30  # address space of the process

_running: subprocess.Popen[bytes] | None = None  # one for the whole daemon
_asking = threading.Lock()  # the inbox's thread, and that of the failed folder, where a job is tried again


def picture_size(path: Path) -> Size:
    """Decode a picture to its end and give its height and width upright.

    Raises:
        RequestError: it cannot be used; says why and what to do.
    """
    height, width = _answer(path, "size", "save it again as PNG or JPEG and drop it again")
    return height, width


def look_at_video(path: Path) -> Footage:
    """Read a video's index and its first frame.

    Raises:
        RequestError: it cannot be used; says why and what to do.
    """
    return Footage(*_answer(path, "video", REMEDY))


def read_comment(path: Path) -> str | None:
    """Read the comment in a video's metadata.

    Raises:
        RequestError: it is no video that can be read.
    """
    comment: str | None = _answer(path, "comment", REMEDY)
    return comment


def _answer(path: Path, what: str, remedy: str) -> Any:
    with _asking:
        line, code = _ask(path, what)
        if not line and code != -signal.SIGALRM:
            # Somebody else may have ended the process; a second time it is the file.
            line, code = _ask(path, what)
    if line:
        answer = json.loads(line)
        if "error" in answer:
            raise RequestError(answer["error"])
        return answer[what]
    if code == -signal.SIGALRM:
        fault = f"takes more than {DECODE_SECONDS} s to decode"
    else:
        fault = f"breaks its decoder (exit code {code})"
    raise RequestError(f"{path.name} {fault}: {remedy}")


def _ask(path: Path, what: str) -> tuple[bytes, int | None]:
    """Give what the process answers; nothing, and how it ended, if it died over it."""
    global _running
    if _running is None:
        _running = subprocess.Popen(
            [sys.executable, "-m", "framepackd.pictures"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(_end_unless_asked)
    assert _running.stdin is not None
    assert _running.stdout is not None
    try:
        _running.stdin.write(json.dumps([what, str(path)]).encode() + b"\n")
        line = _running.stdout.readline()
    except BrokenPipeError:
        line = b""
    return (line, None) if line else (line, _end())


def _end_unless_asked() -> None:
    """End the process with the daemon; one that a thread still asks ends by itself, as its input does."""
    if _asking.acquire(blocking=False):
        _end()


def _end() -> int | None:
    """Let the process end, and say with what exit code it did."""
    global _running
    if _running is None:
        return None
    process, _running = _running, None
    atexit.unregister(_end_unless_asked)
    with process:
        assert process.stdin is not None
        process.stdin.close()
    return process.returncode


def _main() -> None:
    """Answer one line with one line: what is wanted of which path, with that or an error."""
    from framepack_core import footage, media

    for ignored in (signal.SIGINT, signal.SIGTERM):  # the daemon decides when this ends
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    look: dict[str, Callable[[Path], object]] = {
        "size": media.picture_size,
        "video": lambda path: astuple(footage.look(path)),
        "comment": footage.comment,
    }
    for line in sys.stdin:
        signal.alarm(DECODE_SECONDS)  # it ends the process, even in the middle of a decoder
        what, name = json.loads(line)
        try:
            answer: dict[str, object] = {what: look[what](Path(name))}
        except RequestError as error:
            answer = {"error": str(error)}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
