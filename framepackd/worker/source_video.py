"""Decodes the untrusted video that a job extends, in a process of its own.

What comes of it lies in the job's work folder, all of it our own: the part that stays as it is, encoded so
that it can be joined with what is added; its last frames, to the bit, if there are no latents; the picture to
start from, if none was dropped. The same input gives the same bytes: what is interrupted is done again.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framepack_core.errors import RequestError
from framepack_core.media import extend
from framepack_core.media.sizes import Size
from framepackd import files

if TYPE_CHECKING:
    from framepack_core.media.pictures import Picture
    from framepack_core.media.video_colours import Colours

OLD, TAIL, START = "old.mp4", "tail.mp4", "start.png"
ANEW = "encoded-anew"  # an empty file: none of the old part could be copied
SECONDS = 120  # it may take so long
FRAMES_PER_SECOND = 2  # and so much longer that this many are done in a second
MEMORY_BYTES = 6 << 30  # address space of the process
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Continued:
    """A video that is gone on with, and what is to be made ready of it."""

    video: str  # path
    folder: str  # path of what is made ready
    frames: int  # as counted when it was taken in
    latents: int | None  # how many there are of its end; None: it is gone on with from its frames
    window: int
    size: tuple[int, int]  # height, width
    crf: int
    ours: bool = False  # its record lay beside it

    @property
    def known(self) -> int:
        """How many latents of its end there are, or are made."""
        return extend.tail_latents(self.frames) if self.latents is None else self.latents

    @property
    def stays(self) -> int:
        """How many frames stay as they are; the others come with what is added."""
        return self.frames - extend.remade(self.known, self.window)

    def old(self) -> bytes:
        """Give the part that stays as it is, as a segment; b"" if there is none."""
        return (Path(self.folder) / OLD).read_bytes()

    def encoded_anew(self) -> bool:
        """Say whether the part that stays was encoded once more: as it was it cannot be joined to ours."""
        return (Path(self.folder) / ANEW).exists()


def make_ready(continued: Continued) -> None:
    """Make it ready, unless it is.

    Raises:
        RequestError: it cannot be decoded; says why and what to do.
        OSError: there is no room.
    """
    folder = Path(continued.folder)
    if (folder / OLD).exists():  # the last to be written
        return
    files.make_folder(folder)
    name = Path(continued.video).name
    limit = SECONDS + continued.frames / FRAMES_PER_SECOND
    try:
        done = subprocess.run(  # noqa: S603 - ourselves, with no shell between
            [sys.executable, "-m", "framepackd.worker.source_video", json.dumps(asdict(continued))],
            stdout=subprocess.PIPE,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RequestError(f"{name} takes more than {limit:.0f} s to decode: {extend.REMEDY}") from error
    if not done.stdout:
        raise RequestError(f"{name} breaks its decoder (exit code {done.returncode}): {extend.REMEDY}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "errno" in answer:
        raise OSError(answer["errno"], answer["error"], str(folder))
    if "error" in answer:
        raise RequestError(answer["error"])


def _main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever asked is gone: nobody wants it
    if os.getppid() != parent:
        return
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the daemon decides when this ends
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any] = {}
    try:
        _take_apart(Continued(**json.loads(sys.argv[1])))
    except RequestError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"errno": error.errno, "error": error.strerror}
    print(json.dumps(answer))


def _take_apart(continued: Continued) -> None:
    """Decode a video once, from its start to its end, and write what is wanted of it."""
    from framepack_core.media import pictures, segments, video_reader

    path, folder = Path(continued.video), Path(continued.folder)
    height, width = continued.size
    size = height, width
    like = segments.encode([_black(size)], size=size, crf=continued.crf)
    copied = segments.head(path.read_bytes(), like, continued.stays)
    there = segments.count(copied)
    untagged: Colours | None = "bt601" if continued.ours or video_reader.has_our_options(path) else None
    first = continued.frames - extend.frames_of(continued.known)
    tail: list[Picture] = []
    decoded = 0

    def encoded_anew() -> "Iterator[Picture]":
        nonlocal decoded
        for number, frame in enumerate(video_reader.pictures(path, untagged)):
            decoded = number + 1
            picture = pictures.crop_to(frame, size)
            if number == first:
                pictures.write_picture(folder / START, picture)
            if number >= first and continued.latents is None:
                tail.append(picture)
            if there <= number < continued.stays:
                yield picture

    rest = segments.encode(encoded_anew(), size=size, crf=continued.crf)
    if decoded != continued.frames:
        raise RequestError(
            f"{path.name} is damaged: {decoded} of its {continued.frames} frames can be decoded: "
            f"{extend.REMEDY}"
        )
    if tail:
        files.write_bytes(folder / TAIL, segments.encode_exactly(tail))
    if rest and not there:
        files.write_bytes(folder / ANEW, b"")
    part = folder / f"{files.PART_PREFIX}{OLD}.part"
    if there or rest:
        segments.join(part, [copied, rest])
    else:
        part.touch()
    files.sync_file(part)
    part.rename(folder / OLD)
    files.sync_folder(folder)


def _black(size: Size) -> "Picture":
    import numpy as np

    return np.zeros((*size, 3), np.uint8)


if __name__ == "__main__":
    _main()
