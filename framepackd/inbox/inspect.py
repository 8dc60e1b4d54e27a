"""Decodes dropped pictures and videos in a confined process: some break decoders or fill memory.

The process starts with the first of them and ends with the daemon.
"""

import atexit
import json
import logging
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from framepack_core.errors import RequestError
from framepack_core.media.extend import REMEDY, Footage
from framepack_core.media.sizes import Size

log = logging.getLogger(__name__)

DECODE_SECONDS = 15  # a hundred megapixels take four, with their conversion to sRGB
MEMORY_BYTES = 2 << 30  # address space of the process

running: subprocess.Popen[bytes] | None = None  # one for the whole daemon
_asking = threading.Lock()  # the inbox's thread, and that of the failed folder, where a job is tried again


def picture_size(path: Path, tell: Callable[[str], object] = log.warning) -> Size:
    """Read a picture as a video's is read, and give its height and width upright.

    ``tell`` hears what is passed over: a colour profile that cannot be used.

    Raises:
        RequestError: it cannot be used; says why and what to do.
    """
    answer = _answer(path, "size", "save it again as PNG or JPEG and drop it again")
    for text in answer["told"]:
        tell(text)
    height, width = answer["size"]
    return height, width


def make_thumbnail(path: Path, target: Path) -> None:
    """Write a small JPEG of a picture.

    Raises:
        RequestError: it cannot be used; says why and what to do.
    """
    _answer(path, "thumbnail", "save it again as PNG or JPEG and drop it again", target)


def look_at_video(path: Path) -> Footage:
    """Read a video's index and its first frame.

    Raises:
        RequestError: it cannot be used; says why and what to do.
    """
    return Footage(*_answer(path, "video", REMEDY)["video"])


def read_comment(path: Path) -> str | None:
    """Read the comment in a video's metadata.

    Raises:
        RequestError: it is no video that can be read.
    """
    comment: str | None = _answer(path, "comment", REMEDY)["comment"]
    return comment


def _answer(path: Path, what: str, remedy: str, target: Path | None = None) -> dict[str, Any]:
    with _asking:
        line, code = _ask(path, what, target)
        if not line and code != -signal.SIGALRM:
            # Somebody else may have ended the process; a second time it is the file.
            line, code = _ask(path, what, target)
    if line:
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RequestError(answer["error"])
        return answer
    if code == -signal.SIGALRM:
        fault = f"takes more than {DECODE_SECONDS} s to decode"
    else:
        fault = f"breaks its decoder (exit code {code})"
    raise RequestError(f"{path.name} {fault}: {remedy}")


def _ask(path: Path, what: str, target: Path | None) -> tuple[bytes, int | None]:
    """Give what the process answers; nothing, and how it ended, if it died over it."""
    global running
    if running is None:
        running = subprocess.Popen(
            [sys.executable, "-m", "framepackd.inbox.inspect"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(_end_unless_asked)
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        running.stdin.write(
            json.dumps([what, str(path), *([str(target)] if target else [])]).encode() + b"\n"
        )
        line = running.stdout.readline()
    except BrokenPipeError:
        line = b""
    return (line, None) if line else (line, end())


def _end_unless_asked() -> None:
    """End the process with the daemon; one that a thread still asks ends by itself, as its input does."""
    if _asking.acquire(blocking=False):
        end()


def end() -> int | None:
    """Let the process end, and say with what exit code it did."""
    global running
    if running is None:
        return None
    process, running = running, None
    atexit.unregister(_end_unless_asked)
    with process:
        assert process.stdin is not None
        process.stdin.close()
    return process.returncode


def _main() -> None:
    """Answer one line with one line: what is wanted of which path, with that or an error."""
    from PIL import AvifImagePlugin

    from framepack_core.media import pictures, video_reader

    AvifImagePlugin.DEFAULT_MAX_THREADS = 2  # not one a core: each reserves address space
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the daemon decides when this ends
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told: list[str] = []  # of a picture, what is passed over
    look: dict[str, Callable[..., object]] = {
        "size": partial(pictures.picture_size, tell=told.append),
        "video": lambda path: astuple(video_reader.look(path)),
        "comment": video_reader.comment,
        "thumbnail": lambda path, target: pictures.write_thumbnail(path, Path(target)),
    }
    for line in sys.stdin:
        signal.alarm(DECODE_SECONDS)  # it ends the process, even in the middle of a decoder
        what, name, *more = json.loads(line)
        told.clear()
        try:
            answer: dict[str, object] = {what: look[what](Path(name), *more), "told": told}
        except RequestError as error:
            answer = {"error": str(error)}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
