"""Builds a job's video as it grows: encodes section by section, joins when a file is wanted."""

import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain

import av
import safetensors.torch
import torch

from framepack_core.engine import Clip
from framepack_core.media import pictures, segments
from framepack_core.media.pictures import Picture
from framepack_core.media.video_colours import Colours
from framepack_core.networks import vae
from framepackd import files
from framepackd.jobs.folder import STRIP
from framepackd.worker.checkpoint import Checkpoints, DamagedError
from framepackd.worker.messages import Work
from framepackd.worker.strip import Strip

log = logging.getLogger(__name__)

VIDEO = ".mp4"


class Video:
    """What is made of a job's frames; a section of them in memory at a time."""

    def __init__(self, work: Work, clips: Sequence[Checkpoints]) -> None:
        """Build on the segments that the checkpoints of the clips hold; the last is of the one at hand."""
        self._work = work
        self._clips = clips
        self._told = False  # that there is no preview

    def encode(self, clip: Clip) -> bytes:
        """Give a section's segment; what is delivered beside the video is durable when this returns.

        Raises:
            OSError: it could not be written.
        """
        if self._work.save_section_frames:
            png = io.BytesIO()
            pictures.write_picture(png, clip.still)
            files.write_bytes(self._work.result / f".section-{clip.section}.png", png.getvalue())
        if self._work.keep_latents:
            content = safetensors.torch.save({"latents": clip.latents.contiguous()})
            which = f".clip-{len(self._clips)}" if self._work.following else ""
            files.write_bytes(self._work.result / f"{which}.latents.safetensors", content)
        return self._segment(clip.frames)

    def write_preview(self, edge: torch.Tensor | None) -> None:
        """Have the preview be all that exists of the video; the job does not depend on it.

        The frames at the ``edge`` will change yet, and are encoded quickly.
        """
        part = self._work.preview.with_name(f"{files.PART_PREFIX}preview.part")
        try:
            segments.join(part, self._pieces(edge, segments.QUICK))
            files.sync_file(part)
            part.replace(self._work.preview)
        except (OSError, av.FFmpegError, DamagedError, segments.SegmentError) as error:
            if not self._told:
                log.warning("there is no preview of the video: %s", error)
            self._told = True
            part.unlink(missing_ok=True)

    def write(self, edge: torch.Tensor | None, frames: int | None) -> None:
        """Write the video under its name only when it is whole: decoded again, and every frame counted.

        ``edge`` is that of a video that ends early, ``frames`` how many it has if it does not.

        Raises:
            OSError, av.FFmpegError: it cannot be written, or is not what it should be.
            DamagedError: a segment is not what was written.
        """
        part = self._work.result / f"{files.PART_PREFIX}video.part"
        joined = segments.join(part, self._pieces(edge, segments.EXACT), self._work.tags)
        strip = Strip(joined)
        written = pictures.count_frames(part, strip.look if self._work.strip else None)
        if written != joined or joined != (frames or joined):
            raise OSError(f"the video has {written} frames where {frames or joined} were generated")
        if self._work.strip:
            self._save(strip)
        for path in self._work.result.iterdir():
            files.sync_file(path)
        part.rename(self._work.result / VIDEO)
        files.sync_folder(self._work.result)
        files.sync_folder(self._work.result.parent)

    def forget_after(self, sections: int) -> None:
        """Remove what was written of the video and of later sections: by an attempt that was given up."""
        latents = {
            f"{which}.latents.safetensors"
            for which, first in self._first_sections().items()
            if first >= sections
        }
        stills = {f".section-{number}.png" for number in range(sections, self._work.sections)}
        for name in {VIDEO, STRIP} | stills | latents:
            (self._work.result / name).unlink(missing_ok=True)

    def _first_sections(self) -> dict[str, int]:
        """Say with which section the clips begin, by what their files are called."""
        clips = len(self._work.clips)
        if clips == 1:
            return {"": 0}
        return {f".clip-{number + 1}": number * self._work.sections // clips for number in range(clips)}

    def _save(self, strip: Strip) -> None:
        try:
            strip.save(self._work.result / STRIP)
        except OSError as error:  # the video does without
            log.warning("there is no picture of the video's frames: %s", error)
            (self._work.result / STRIP).unlink(missing_ok=True)

    def _pieces(self, edge: torch.Tensor | None, options: str) -> Iterator[bytes]:
        """Give the video's segments in the order of time, with one more of the frames at its edge."""
        unfinished = b""
        if edge is not None:
            unfinished = self._segment(vae.to_uint8(edge), options)
        *before, at_hand = self._durable()
        for segments_of_clip in before:
            yield from segments_of_clip
        if self._work.spec.kind == "framepack":
            yield unfinished
        yield from at_hand
        if self._work.spec.kind == "f1":
            yield unfinished

    def _durable(self) -> Iterator[Iterator[bytes]]:
        """Give what lies on disk in the order of time: the video gone on with, and clip by clip."""
        if self._work.continued is not None:
            yield iter([self._work.continued.old()])
        for clip in self._clips:
            yield clip.segments(self._work.spec.kind)

    def _segment(self, frames: Iterable[Picture], options: str = segments.EXACT) -> bytes:
        size, crf = self._work.size, self._work.crf
        return segments.encode(frames, size=size, crf=crf, options=options, colours=self._colours)

    @cached_property
    def _colours(self) -> Colours:
        """Those of what is there: a video that an older version began ends in its colours."""
        there = next(filter(None, chain.from_iterable(self._durable())), b"")
        return segments.colours_of(there) if there else "bt709"
