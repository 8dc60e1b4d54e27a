"""Pictures in, video out: reading and cropping with Pillow, encoding with PyAV. No torch here."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from framepack_core.buckets import Size
from framepack_core.errors import RequestError
from framepack_core.sections import FPS

Picture = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3), RGB
Frames = np.ndarray[Any, np.dtype[np.uint8]]  # (T, H, W, 3), RGB
MAX_SCALED_PIXELS = 1 << 27  # a strip of a picture would be scaled to gigabytes before it is cropped
ENCODER_THREADS = 2  # fixed: libx264 writes other bytes with another number of threads
# The macroblock tree of libx264 (core 165, AVX) reads memory it did not write: the same frames gave other
# bytes in up to 75 % of runs, depending on the width. Without it 760 of 760 runs over nine sizes were equal.
ENCODER_OPTIONS = {"x264-params": "mbtree=0"}


def open_picture(path: Path) -> Picture:
    """Read a picture upright, as 8-bit RGB; transparency is dropped.

    Raises:
        RequestError: it is not a picture, is damaged, too large, animated or has more than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            # A warning there means more pixels than any camera makes: memory for nothing.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _refuse_unusual(path, image)
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{path.name} is not a picture that can be read: save it as PNG or JPEG and drop it again"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{path.name} is too large ({error}): scale it down and drop it again") from error
    except RequestError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise RequestError(
            f"{path.name} is damaged ({error}): save it again as PNG or JPEG and drop it again"
        ) from error


def _refuse_unusual(path: Path, image: Image.Image) -> None:
    # MPO: a camera's JPEG with a preview or a depth map behind the photo.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise RequestError(
            f"{path.name} is animated ({getattr(image, 'n_frames', 1)} frames): "
            "save the frame to start from as PNG and drop that"
        )
    if image.mode.startswith(("I", "F")):
        raise RequestError(
            f"{path.name} has more than 8 bits per channel (mode {image.mode}): "
            "save it with 8 bits per channel and drop it again"
        )


def crop_to(picture: Picture, size: Size) -> Picture:
    """Scale a picture until it covers a size and cut the centre out, as the reference does.

    Rounding matters: sizes half to even, Lanczos, a crop box in fractions of a pixel.
    """
    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    scale = max(width / picture.shape[1], height / picture.shape[0])
    scaled_width, scaled_height = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
    if scaled_width * scaled_height > MAX_SCALED_PIXELS:
        raise RequestError(
            f"a picture of {picture.shape[1]}x{picture.shape[0]} is too far from the shape of a "
            f"{width}x{height} video: crop it and drop it again"
        )
    scaled = Image.fromarray(picture).resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    # Fractions are meant: Pillow rounds the edges, each by itself.
    box: Any = (
        (scaled_width - width) / 2,
        (scaled_height - height) / 2,
        (scaled_width + width) / 2,
        (scaled_height + height) / 2,
    )
    return np.array(scaled.crop(box))


def write_picture(path: Path, picture: Picture) -> None:
    """Write a picture (H, W, 3) as PNG."""
    Image.fromarray(picture).save(path, format="PNG")


def write_video(path: Path, frames: Iterable[Picture], *, size: Size, crf: int) -> None:
    """Encode frames as H.264, yuv420p, 30 fps, index in front: the same bytes for the same frames."""
    import av  # here: loading FFmpeg takes longer than what else this module is used for

    with av.open(path, mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), **ENCODER_OPTIONS})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = ENCODER_THREADS
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def count_frames(path: Path) -> int:
    """Decode a video to its end and count its frames.

    Raises:
        OSError, av.FFmpegError: it cannot be read.
    """
    import av

    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))
