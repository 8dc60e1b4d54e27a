"""Videos made for tests: small, moving, in the formats that people have."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".webm": ("libvpx", "yuv420p"), ".avi": ("mpeg4", "yuv420p"), ".gif": ("gif", "rgb8")}


def make_video(
    path: Path,
    frames: int = 20,
    *,
    rate: Fraction | int = 10,
    size: tuple[int, int] = (48, 64),
    seed: int = 0,
    times: list[int] | None = None,
    moving: int = 3,
) -> Path:
    """Write a pattern that moves by some pixels a frame; ``times`` in frames, else one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        write_frames(container, path.suffix, frames, rate, size, seed, times, moving)
    return path


def make_endless(path: Path, frames: int) -> Path:
    """Write a recording that nobody ended: it tells no duration."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            piece = bytes(data)  # type: ignore[call-overload] # a buffer
            self.content += piece
            return len(piece)

    pipe = Pipe()
    with av.open(pipe, "w", format="webm") as container:
        write_frames(container, ".webm", frames, 10, (48, 64), 0, None, 3)
    path.write_bytes(pipe.content)
    return path


def write_frames(
    container: "av.container.OutputContainer",
    suffix: str,
    frames: int,
    rate: Fraction | int,
    size: tuple[int, int],
    seed: int,
    times: list[int] | None,
    moving: int,
) -> None:
    codec, pixels = CODECS.get(suffix, ("libx264", "yuv420p"))
    stream = container.add_stream(codec, rate=rate)
    assert isinstance(stream, av.VideoStream)
    stream.height, stream.width = size
    stream.pix_fmt = pixels
    shape = (size[0] // 8 + 1, (size[1] + frames * moving) // 8 + 1, 3)
    pattern = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    wide = np.kron(pattern, np.ones((8, 8, 1), np.uint8))[: size[0]]
    for number in range(frames):
        view = np.ascontiguousarray(wide[:, number * moving : number * moving + size[1]])
        frame = av.VideoFrame.from_ndarray(view, format="rgb24")
        frame.pts = times[number] if times else number
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def make_sound(path: Path) -> Path:
    """Write a file that holds sound and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for number in range(50):
            frame.pts = number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
