"""Decodes the untrusted video that a job extends, in a confined process.

It writes into the job's work folder: the part that stays, encoded so that the new part can be joined to it;
its last frames, losslessly, if there are no latents; the start picture, if none was dropped. The same input
gives the same bytes: after an interruption it starts again.
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
FRAMES_PER_SECOND = 2  # and so much longer that this many are decoded in a second
MEMORY_BYTES = 6 << 30  # address space of the process
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Continued:
    """A video that a job extends, and where its parts are written."""

    video: str  # path
    folder: str  # path of the parts
    frames: int  # as counted at intake
    latents: int | None  # how many there are of its end; None: it is extended from its frames
    window: int
    size: tuple[int, int]  # height, width
    crf: int
    ours: bool = False  # its record was dropped with it

    @property
    def known(self) -> int:
        """How many latents of its end there are, or are encoded."""
        return extend.tail_latents(self.frames) if self.latents is None else self.latents

    @property
    def stays(self) -> int:
        """How many frames stay as they are; the others are made again with the new part."""
        return self.frames - extend.remade(self.known, self.window)

    def old(self) -> bytes:
        """Give the part that stays as it is, as a segment; b"" if there is none."""
        return (Path(self.folder) / OLD).read_bytes()

    def encoded_anew(self) -> bool:
        """Say whether the part that stays was encoded again: its own packets cannot be joined to ours."""
        return (Path(self.folder) / ANEW).exists()


def prepare(continued: Continued) -> None:
    """Write what the job needs of the video, unless it is written.

    Raises:
        RequestError: the video cannot be decoded; says why and what to do.
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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # two must never write into a folder
    if os.getppid() != parent:
        return
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the daemon decides when this ends
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any] = {}
    try:
        split(Continued(**json.loads(sys.argv[1])))
    except RequestError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"errno": error.errno, "error": error.strerror}
    print(json.dumps(answer))


def split(continued: Continued) -> None:
    """Decode the video once, from start to end, and write its parts; in the confined process.

    Raises:
        RequestError: the video cannot be decoded.
        OSError: there is no room.
    """
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
