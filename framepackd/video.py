"""The video of a job as it grows: frames are encoded section by section, and joined when a file is wanted."""

import io
import logging
from collections.abc import Iterator, Sequence

import av
import safetensors.torch
import torch

from framepack_core import media, segments, vae
from framepack_core.engine import Clip
from framepackd import files
from framepackd.checkpoint import Checkpoints, DamagedError
from framepackd.results import STRIP
from framepackd.strip import Strip
from framepackd.worker import Work

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
            media.write_picture(png, clip.still)
            files.write_bytes(self._work.result / f".section-{clip.section}.png", png.getvalue())
        if self._work.keep_latents:
            content = safetensors.torch.save({"latents": clip.latents.contiguous()})
            which = f".clip-{len(self._clips)}" if self._work.following else ""
            files.write_bytes(self._work.result / f"{which}.latents.safetensors", content)
        return segments.encode(clip.frames, size=self._work.size, crf=self._work.crf)

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
        joined = segments.join(part, self._pieces(edge, segments.EXACT))
        strip = Strip(joined)
        written = media.count_frames(part, strip.look if self._work.strip else None)
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
        kind = self._work.spec.kind
        unfinished = b""
        if edge is not None:
            frames = vae.to_uint8(edge)
            unfinished = segments.encode(frames, size=self._work.size, crf=self._work.crf, options=options)
        if self._work.continued is not None:
            yield self._work.continued.old()
        *finished, at_hand = self._clips
        for clip in finished:
            yield from clip.segments(kind)
        if kind == "framepack":
            yield unfinished
        yield from at_hand.segments(kind)
        if kind == "f1":
            yield unfinished
