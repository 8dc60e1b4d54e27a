"""Builds a job's video: encodes section by section, joins the segments to a preview or the whole file."""

import io
import logging
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import av
import safetensors.torch
import torch
from av import VideoFrame
from PIL import Image

from framepack_core.engine import Clip
from framepack_core.media import pictures, segments
from framepack_core.media.pictures import Picture
from framepack_core.media.video_colours import Colours, to_rgb
from framepack_core.networks import vae
from framepackd import files
from framepackd.jobs.folder import STRIP, VIDEO
from framepackd.worker.chain import Chain
from framepackd.worker.messages import Work
from framepackd.worker.state_file import DamagedError

log = logging.getLogger(__name__)

FILMSTRIP_FRAMES = 5
FILMSTRIP_PIXELS = 240 * 240  # of each, whatever its shape
FILMSTRIP_QUALITY = 80  # of the JPEG: 30 kB for five frames of a photo


class Filmstrip:
    """Some frames of a finished video, from the first to the last, for the results page."""

    def __init__(self, count: int) -> None:
        """Expect a video of so many frames."""
        self._wanted = {
            round(number * (count - 1) / (FILMSTRIP_FRAMES - 1)) for number in range(FILMSTRIP_FRAMES)
        }
        self._frames: list[Image.Image] = []

    def offer(self, number: int, frame: VideoFrame) -> None:
        """Keep a frame, scaled down, if it is one of those that are shown."""
        if number in self._wanted:
            scale = math.sqrt(FILMSTRIP_PIXELS / (frame.width * frame.height))
            size = max(round(scale * frame.height), 1), max(round(scale * frame.width), 1)
            self._frames.append(Image.fromarray(to_rgb(frame, "bt601", size)))

    def save(self, path: Path) -> None:
        """Write the frames side by side, as a JPEG.

        Raises:
            OSError: it cannot be written.
        """
        width, height = self._frames[0].size
        strip = Image.new("RGB", (width * len(self._frames), height))
        for number, frame in enumerate(self._frames):
            strip.paste(frame, (number * width, 0))
        strip.save(path, "JPEG", quality=FILMSTRIP_QUALITY)


class Video:
    """The files made of a job's frames; one section of frames in memory at a time."""

    def __init__(self, work: Work, chain: Chain) -> None:
        """Build on the segments in the checkpoints of the clips."""
        self._work = work
        self._chain = chain
        self._warned = False  # that there is no preview

    def encode(self, clip: Clip) -> bytes:
        """Encode a section as a segment; its stills and latents are durable when this returns.

        Raises:
            OSError: they could not be written.
        """
        if self._work.save_section_frames:
            png = io.BytesIO()
            pictures.write_picture(png, clip.still)
            files.write_bytes(self._work.result / f".section-{clip.section}.png", png.getvalue())
        if self._work.keep_latents:
            content = safetensors.torch.save({"latents": clip.latents.contiguous()})
            which = f".clip-{self._chain.current + 1}" if self._work.following else ""
            files.write_bytes(self._work.result / f"{which}.latents.safetensors", content)
        return self._segment(clip.frames)

    def write_preview(self, edge: torch.Tensor | None) -> None:
        """Write all that exists of the video as its preview; the job does not depend on it.

        The frames at the ``edge`` will still change, and are encoded quickly.
        """
        part = self._work.preview.with_name(f"{files.PART_PREFIX}preview.part")
        try:
            segments.join(part, self._pieces(edge, segments.QUICK))
            files.sync_file(part)
            part.replace(self._work.preview)
            files.tell_written(self._work.preview, durable=False)
        except (OSError, av.FFmpegError, DamagedError, segments.SegmentError) as error:
            if not self._warned:
                log.warning("there is no preview of the video: %s", error)
            self._warned = True
            part.unlink(missing_ok=True)

    def write(self, edge: torch.Tensor | None, frames: int | None) -> None:
        """Write the video; it gets its name only when it is whole: decoded again, every frame counted.

        ``edge`` belongs to a video that ends early; ``frames`` is the length of one that does not.

        Raises:
            OSError, av.FFmpegError: it cannot be written, or is not what it should be.
            DamagedError: a segment is not what was written.
        """
        part = self._work.result / f"{files.PART_PREFIX}video.part"
        joined = segments.join(part, self._pieces(edge, segments.EXACT), self._work.tags)
        filmstrip = Filmstrip(joined)
        written = pictures.count_frames(part, filmstrip.offer if self._work.filmstrip else None)
        if written != joined or joined != (frames or joined):
            raise OSError(f"the video has {written} frames where {frames or joined} were generated")
        if self._work.filmstrip:
            self._save(filmstrip)
        for path in self._work.result.iterdir():
            files.sync_file(path)
        part.rename(self._work.result / VIDEO)
        files.sync_folder(self._work.result)
        files.sync_folder(self._work.result.parent)
        if (self._work.result / STRIP).exists():
            files.tell_written(self._work.result / STRIP)
        files.tell_written(self._work.result / VIDEO)

    def forget_after(self, sections: int) -> None:
        """Remove the video and the files of later sections, which an abandoned attempt wrote."""
        latents = {
            f"{which}.latents.safetensors"
            for which, first in self._first_sections().items()
            if first >= sections
        }
        stills = {f".section-{number}.png" for number in range(sections, self._work.sections)}
        for name in {VIDEO, STRIP} | stills | latents:
            files.remove(self._work.result / name)

    def _first_sections(self) -> dict[str, int]:
        """Give the first section of each clip, by the name of its files."""
        clips = len(self._work.clips)
        if clips == 1:
            return {"": 0}
        return {f".clip-{number + 1}": number * self._work.sections // clips for number in range(clips)}

    def _save(self, filmstrip: Filmstrip) -> None:
        try:
            filmstrip.save(self._work.result / STRIP)
        except OSError as error:  # the video is delivered without it
            log.warning("there is no picture of the video's frames: %s", error)
            files.remove(self._work.result / STRIP)

    def _pieces(self, edge: torch.Tensor | None, options: str) -> Iterator[bytes]:
        """Give the video's segments in the order of time, and one more for the frames at its edge."""
        unfinished = b""
        if edge is not None:
            unfinished = self._segment(vae.to_uint8(edge), options)
        *before, current = self._durable()
        for segments_of_clip in before:
            yield from segments_of_clip
        if self._work.spec.kind == "framepack":
            yield unfinished
        yield from current
        if self._work.spec.kind == "f1":
            yield unfinished

    def _durable(self) -> Iterator[Iterator[bytes]]:
        """Give the segments on disk in the order of time: of the extended video, then clip by clip."""
        if self._work.continued is not None:
            yield iter([self._work.continued.old()])
        for clip in self._chain.joined:
            yield clip.checkpoints.segments(self._work.spec.kind)

    def _segment(self, frames: Iterable[Picture], options: str = segments.EXACT) -> bytes:
        size, crf = self._work.size, self._work.crf
        return segments.encode(frames, size=size, crf=crf, options=options, colours=self.colours)

    @cached_property
    def colours(self) -> Colours:
        """Those of the segments on disk: a video that an older version began keeps its colours."""
        existing = next(filter(None, chain.from_iterable(self._durable())), b"")
        return segments.colours_of(existing) if existing else "bt709"
