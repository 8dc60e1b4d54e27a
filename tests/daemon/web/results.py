"""Puts finished videos into an outbox, as a daemon would have, for tests that need many."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import av
import numpy as np

from tests.acceptance.conftest import picture

SIZES = [(48, 64), (64, 48), (48, 48)]  # height, width


def video(path: Path) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for shade in range(0, 250, 5):
            pixels = np.full((48, 64, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def finished(outbox: Path, count: int) -> list[str]:
    """Put so many results there, three a day, and give their ids, the newest first."""
    clip = video(outbox.parent / "clip.mp4").read_bytes()
    ids = []
    for number in range(count):
        when = datetime.now(UTC) - timedelta(hours=8 * number + 1)
        name, folder = f"made-{number:03d}", outbox / ("sea" if number % 2 else "")
        height, width = SIZES[number % len(SIZES)]
        ids.append(f"{when:%Y%m%d-%H%M%S}-{number:06x}")
        record = {
            "id": ids[-1],
            "name": name,
            "state": "done",
            "finished_at": f"{when:%Y-%m-%dT%H:%M:%SZ}",
            "width": width,
            "height": height,
            "frames": 50,
            "fps": 30,
            "sections": 1,
            "prompt": f"The {'wave' if number % 2 else 'otter'} moves, number {number}.",
            "seed": number,
            "steps": 1,
            "seconds": 1.0,
            "model": "tiny",
            "cache": "none",
            "quality": "frozen" if number % 20 == 3 else None,
            "timings": {"sampling": 3.0},
            "inputs": {"image": {"file": f"{name}.png"}, "text": {"file": f"{name}.txt"}},
        }
        picture(folder / f"{name}.png", number, (height, width))
        (folder / f"{name}.txt").write_text(str(record["prompt"]))
        (folder / f"{name}.mp4").write_bytes(clip)
        (folder / f"{name}.json").write_text(json.dumps(record))
    return ids
