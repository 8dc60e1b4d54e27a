"""Measures the way from decoded pixels to the mp4 at 640x608, with a playable file after every section.

Ours: blend, convert, encode the section, make it durable, write the preview; at the end join, and decode to
count. The plain way: keep the pixels of the whole history as float16, and after every section convert and
encode all of it again, with the same encoder. Each in its own process; drawing the frames does not count.

python -m benchmarks.writer
"""

import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from benchmarks import Row
from framepack_core.engine import Clip
from framepack_core.history import History
from framepack_core.media import segments
from framepack_core.models.registry import BUILT_IN
from framepack_core.networks import vae
from framepack_core.progress import Progress
from framepack_core.request import Request
from framepack_core.sections import FPS, Kind, frame_count, plan, section_count
from framepackd.worker.chain import Chain
from framepackd.worker.messages import Work
from framepackd.worker.video import Video

HEIGHT, WIDTH, WINDOW, CRF = 640, 608, 9, 16
OVERLAP, NEW = 4 * WINDOW - 3, 4 * WINDOW  # frames
LATENTS = torch.zeros(1, 16, 1, 1, 1)  # those of the video are measured by themselves
KINDS: tuple[Kind, ...] = ("framepack", "f1")


@dataclass
class Cost:
    """The cost of a video; ``encoded`` counts every frame as often as it was encoded."""

    cpu: float = 0.0  # seconds
    encoded: int = 0
    frames: int = 0
    rss: float = 0.0  # GiB, the peak of the process

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add the processor time of this process, all its threads, to the cost."""
        began = time.process_time()
        yield
        self.cpu += time.process_time() - began


class Scene:
    """A large picture with grain, panned over in a curve, in place of a real video."""

    def __init__(self) -> None:
        """Draw it, always the same."""
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        smooth = np.array(Image.fromarray(coarse).resize((1600, 1100), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 8, smooth.shape).astype(np.int16)
        self._picture = torch.from_numpy((smooth + grain).clip(0, 255).astype(np.uint8)).permute(2, 0, 1)

    def decode(self, first: int, count: int) -> torch.Tensor:
        """Give frames as the VAE does on a GPU: (1, 3, T, H, W), float16 around [-1, 1]."""
        pixels = torch.empty((1, 3, count, HEIGHT, WIDTH), dtype=torch.float16)
        for number in range(count):
            angle = (first + number) / 150
            top, left = int(230 + 220 * np.sin(angle)), int(490 + 480 * np.cos(0.7 * angle))
            frame = self._picture[:, top : top + HEIGHT, left : left + WIDTH]
            pixels[0, :, number] = frame.half() / 127.5 - 1
        return pixels


def windows(kind: Kind, sections: int) -> Iterator[tuple[int, int]]:
    """Give what is decoded after each section: the first frame and how many."""
    frames = frame_count(sections, WINDOW)
    for section in range(sections):
        if kind == "f1":
            count = NEW + 1 if section == 0 else OVERLAP + NEW
            yield NEW * (section + 1) + 1 - count, count
        else:
            count = OVERLAP if section == 0 else OVERLAP + NEW + (4 if section == sections - 1 else 0)
            yield max(frames - OVERLAP - NEW * section, 4) - (4 if section == sections - 1 else 0), count


def ours(kind: Kind, seconds: float) -> Cost:
    """Write a video as the worker does, but do not look for flaws in it, which the plain way does not."""
    cost, scene = Cost(), Scene()
    sections = section_count(seconds, WINDOW)
    frames = frame_count(sections, WINDOW)
    encode = segments.encode

    def counting(pictures: np.ndarray, **named: Any) -> bytes:
        cost.encoded += len(pictures)
        return encode(pictures, **named)

    segments.encode = counting  # type: ignore[assignment] # its frames lie in one array here
    with tempfile.TemporaryDirectory() as name:
        work = example_work(Path(name), kind, sections)
        work.result.mkdir()
        chain = Chain(work, {}, print)
        checkpoints = chain.clip.checkpoints
        video, progress = Video(work, chain), Progress.start(1)
        for section, (first, count) in enumerate(windows(kind, sections)):
            decoded = scene.decode(first, count)
            with cost.counted():
                settled, edge = vae.join(
                    kind, progress.edge, decoded, OVERLAP, is_last=section == sections - 1
                )
                del decoded  # on a GPU it lies there
                progress = Progress(progress.noise, (*progress.sampled, LATENTS), section + 1, edge)
                pictures = vae.to_uint8(settled)
                del settled
                clip = Clip(section, sections, pictures, True, pictures[:1], progress, LATENTS, kind)
                checkpoints.save(progress, {}, video.encode(clip))
                if edge is not None:
                    video.write_preview(edge)
        with cost.counted():
            video.write(None, frames)
    cost.frames = frames
    return cost


def plain(kind: Kind, seconds: float) -> Cost:
    """Write the same video again after every section."""
    cost, scene = Cost(), Scene()
    sections = section_count(seconds, WINDOW)
    history: torch.Tensor | None = None
    with tempfile.TemporaryDirectory() as name:
        for first, count in windows(kind, sections):
            decoded = scene.decode(first, count)
            with cost.counted():
                if history is None:
                    history = decoded
                elif kind == "f1":
                    history = vae.blend(history, decoded, OVERLAP)
                else:
                    history = vae.blend(decoded, history, OVERLAP)
                pixels = history.float().clamp(-1, 1) * 127.5 + 127.5
                pictures = pixels.to(torch.uint8)[0].permute(1, 2, 3, 0).contiguous().numpy()
                cost.encoded += len(pictures)
                encode_whole(Path(name) / "video.mp4", pictures)
                del pixels, pictures
                gc.collect()
    assert history is not None
    cost.frames = history.shape[2]
    return cost


def latents(kind: Kind, seconds: float) -> Cost:
    """Keep what the core keeps of a video in latents: sections, and the history they look back on."""
    start = torch.ones(1, 16, 1, HEIGHT // 8, WIDTH // 8)
    history, sampled = History(kind, WINDOW, start), []
    sections = plan(kind, section_count(seconds, WINDOW), WINDOW)
    for section in sections:
        sampled.append(torch.ones(1, 16, WINDOW, HEIGHT // 8, WIDTH // 8))
        history.append(section, sampled[-1])
    return Cost(frames=frame_count(len(sections), WINDOW))


def encode_whole(path: Path, pictures: np.ndarray) -> None:
    """Encode a video from its first frame on."""
    with av.open(path, mode="w", format="mp4") as container:
        options = {"crf": str(CRF), "x264-params": segments.EXACT}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = segments.ENCODER_THREADS
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def example_work(folder: Path, kind: Kind, sections: int) -> Work:
    """Ask for a video."""
    return Work(
        job_id="job",
        request=Request(image=folder / "none.png", prompt="none"),
        spec=BUILT_IN[kind],
        fingerprint="",
        result=folder / "result",
        checkpoint=folder / "checkpoint",
        preview=folder / "preview.mp4",
        sections=sections,
        frames=frame_count(sections, WINDOW),
        size=(HEIGHT, WIDTH),
        crf=CRF,
        save_section_frames=False,
        keep_latents=False,
        device="cpu",
        dtype="auto",
        precision="exact",
        compile_cache=folder / "compiled",
        load_lock=folder / "load.lock",
        levels={},
    )


WAYS: dict[str, Callable[[Kind, float], Cost]] = {"ours": ours, "plain": plain, "latents": latents}


def measure(way: str, kind: Kind, seconds: float) -> Cost:
    """Take one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.writer", way, kind, str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603 - this very module
    return Cost(**json.loads(done.stdout))


def rows() -> Iterator[Row]:
    """Measure both models; 20 minutes on two cores. The plain way needs 20 GiB for 60 s: extrapolated."""
    for kind in KINDS:
        short, long, longest = (measure("ours", kind, seconds) for seconds in (20, 60, 120))
        base = measure("plain", kind, 20)
        encoded = sum(first for first in _lengths(kind, section_count(60, WINDOW)))
        for name, mine, theirs in (
            ("20 s", short, base.cpu),
            ("60 s, plain extrapolated", long, base.cpu / base.encoded * encoded),
        ):
            yield Row(f"mp4 path, {kind}, {name}", mine.cpu, theirs, "CPU s", "frames are encoded once")
        yield Row(f"peak RSS, {kind}, 20 s", short.rss, base.rss, "GiB", "no history of pixels is kept")
        yield Row(f"peak RSS, {kind}, 60 s", long.rss, None, "GiB", "the same")
        yield Row(f"peak RSS, {kind}, 120 s over 20 s", longest.rss / short.rss, None, "x", "RAM is flat")
        for name, mine in (("20 s", short), ("60 s", long)):
            yield Row(
                f"frames encoded / frames, {kind}, {name}",
                mine.encoded / mine.frames,
                base.encoded / base.frames if mine is short else encoded / mine.frames,
                "x",
                "at most twice",
            )
        kept = [measure("latents", kind, seconds).rss for seconds in (20, 120)]
        yield Row(f"RSS of latents, {kind}, 120 s - 20 s", kept[1] - kept[0], None, "GiB", "what still grows")


def _lengths(kind: Kind, sections: int) -> Iterator[int]:
    """Give how many frames the video has after each section."""
    frames = 0
    for _, count in windows(kind, sections):
        frames += count - (OVERLAP if frames else 0)
        yield frames


def main() -> None:
    """Print all rows, or take the one measurement that is asked for."""
    if len(sys.argv) > 1:
        way, kind, seconds = sys.argv[1:]
        torch.set_num_threads(1)  # two wait for each other on a busy machine, and that would count
        cost = WAYS[way](next(known for known in KINDS if known == kind), float(seconds))
        cost.rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        print(json.dumps(asdict(cost)))
        return
    for row in rows():
        beside = "" if row.baseline is None else f"{row.baseline:10.2f} {row.baseline / row.ours:6.2f}x"
        print(f"{row.name:50} {row.ours:10.2f} {beside} {row.unit}", flush=True)


if __name__ == "__main__":
    main()
