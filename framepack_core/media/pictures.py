"""Reads, crops and writes pictures with Pillow, and counts the frames of a video. No torch here."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from framepack_core.errors import RequestError
from framepack_core.media import heif, png, profiles
from framepack_core.media.sizes import MAX_PIXELS, Size, covering_size
from framepack_core.request import WHITE

if TYPE_CHECKING:
    from av import VideoFrame

Picture = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3), RGB
Frames = np.ndarray[Any, np.dtype[np.uint8]]  # (T, H, W, 3), RGB
log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF")  # no others: some of Pillow's readers start programs
FIRST_SIDEWAYS = 5  # from this EXIF orientation on, height and width are exchanged
BAND_PIXELS = 1 << 20  # converted at once
THUMBNAIL_PIXELS = 640  # the longer side
FEW_BITS = {"L;2": 85, "L;4": 17}  # Pillow scales samples of few bits by this, but not the transparent colour


def open_picture(path: Path, background: str = WHITE, tell: Callable[[str], object] = log.warning) -> Picture:
    """Read a picture upright, as 8-bit sRGB; transparent parts show the background.

    Colours are converted by the picture's ICC profile. Opaque pictures without a profile, or with sRGB's,
    keep their pixels bit for bit. Of 16 bits per channel, the upper eight are kept.

    Args:
        path: the file; its content decides the format, not its name.
        background: "#rrggbb".
        tell: receives a warning for everything in the file that is ignored.

    Raises:
        RequestError: it is not a readable picture, is damaged, too large or animated.
    """
    with _decoded(path) as found:
        picture = np.empty((found.image.height, found.image.width, 3), np.uint8)
        for top, band in _bands(path, found, background, tell):
            picture[top : top + band.height] = np.asarray(band)
        orientation = _orientation(found.image)
        if orientation == 1:
            return picture
        turned = Image.fromarray(picture)
        turned.getexif()[ExifTags.Base.Orientation] = orientation
        return np.array(ImageOps.exif_transpose(turned))


def picture_size(path: Path, tell: Callable[[str], object] = log.warning) -> Size:
    """Decode a picture as ``open_picture`` does, and give its upright height and width.

    Raises:
        RequestError: as ``open_picture``.
    """
    with _decoded(path) as found:
        height, width = found.image.height, found.image.width
        sideways = _orientation(found.image) >= FIRST_SIDEWAYS
        for _ in _bands(path, found, WHITE, tell):
            pass
        return (width, height) if sideways else (height, width)


class _Found(NamedTuple):
    """A decoded picture, before orientation, colours and transparency are applied."""

    image: Image.Image
    profile: bytes | None  # its ICC profile
    problem: str | None  # why the profile cannot be read
    packing: str  # of a PNG file's samples, as Pillow names it; else empty


@contextmanager
def _decoded(path: Path) -> Iterator[_Found]:
    """Open and decode a picture; turn the errors of the libraries into RequestErrors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities in the file, and sizes below our own limit
            with path.open("rb") as file:
                head = file.read(heif.HEAD_BYTES)
                if heif.is_heif(head):
                    image = heif.decode(path)
                    yield _Found(image, image.info.get("icc_profile"), None, "")
                    return
                trimmed = png.trim(file) if png.is_png(head) else png.Trimmed(file)
                trimmed.file.seek(0)
                with Image.open(trimmed.file, formats=FORMATS) as image:
                    _refuse_unusual(path, image)
                    packing = image.tile[0].args if image.format == "PNG" and image.tile else ""
                    image.load()
                    profile = trimmed.profile if image.format == "PNG" else image.info.get("icc_profile")
                    yield _Found(image, profile, trimmed.problem, str(packing))
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{path.name} is not a picture that can be read: save it as PNG or JPEG and drop it again"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except RequestError:
        raise
    except MemoryError as error:
        raise RequestError(
            f"{path.name} needs too much memory to decode: save it again as PNG or JPEG and drop it again"
        ) from error
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise RequestError(
            f"{path.name} is damaged ({error}): save it again as PNG or JPEG and drop it again"
        ) from error


def _bands(
    path: Path, found: _Found, background: str, tell: Callable[[str], object]
) -> Iterator[tuple[int, Image.Image]]:
    """Convert a picture to opaque sRGB in bands from the top; gives each with the number of its first row.

    So intermediate pictures take memory for a band, not for a hundred megapixels.
    """
    convert = _converter(path, found, tell)
    image = found.image
    # Many programs fill the fourth byte of a BMP with zeros; viewers show such pictures as opaque.
    clear = image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
    rows = max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        colours, alpha = _split_alpha(band, found.packing)
        colours = convert(colours).convert("RGB")
        if alpha is not None and not clear and alpha.getextrema() != (255, 255):
            ground = Image.new("RGB", band.size, background)
            ground.paste(colours, mask=alpha)
            colours = ground
        yield top, colours


def _converter(
    path: Path, found: _Found, tell: Callable[[str], object]
) -> Callable[[Image.Image], Image.Image]:
    """Give the conversion of a picture's colours to sRGB; warn if its profile cannot be used."""
    grey = found.image.mode in ("1", "L", "LA", "I;16") or found.packing == "LA;16B"
    space = "GRAY" if grey else found.image.mode.removesuffix("A")
    problem = found.problem
    if found.profile:
        try:
            return profiles.converter(found.profile, space)
        except profiles.ProfileError as error:
            problem = str(error)
    if problem is not None:
        tell(f"{path.name}: its colour profile is ignored: {problem}")
    return lambda image: image


def _split_alpha(image: Image.Image, packing: str) -> tuple[Image.Image, Image.Image | None]:
    """Split a picture into its colours (L, RGB or CMYK, 8 bits) and its alpha channel (L), if it has one."""
    clear = image.info.get("transparency")  # the transparent colour, in the file's samples
    if image.mode == "I;16":
        samples = np.asarray(image)
        alpha = None if clear is None else Image.fromarray((samples != clear) * np.uint8(255))
        return Image.fromarray((samples >> 8).astype(np.uint8)), alpha
    if clear is not None:
        if packing == "RGB;16B":
            clear = tuple(sample >> 8 for sample in clear)
        elif packing in FEW_BITS:
            clear *= FEW_BITS[packing]
        image.info["transparency"] = clear
        image = image.convert("RGBA" if image.mode in ("P", "RGB") else "LA")
    if image.mode in ("PA", "P"):
        image = image.convert("RGBA" if image.mode == "PA" else "RGB")
    if packing == "LA;16B":
        image = Image.merge("LA", (image.getchannel("R"), image.getchannel("A")))
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    mode = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    return image if image.mode == mode else image.convert(mode), alpha


def _refuse_unusual(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    # MPO: a camera's JPEG with a preview or a depth map behind the photo.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise RequestError(
            f"{path.name} is animated ({getattr(image, 'n_frames', 1)} frames): "
            "save the frame to start from as PNG and drop that"
        )


def _too_large(path: Path) -> RequestError:
    return RequestError(
        f"{path.name} is too large: it has more than {MAX_PIXELS // 10**6} megapixels: "
        "scale it down and drop it again"
    )


def _orientation(image: Image.Image) -> int:
    """Give the EXIF orientation, 1 to 8; 1 (upright) if it is missing or invalid."""
    try:
        said = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF is ignored, as viewers do
        return 1
    return said if said in range(1, 9) else 1


def crop_to(picture: Picture, size: Size) -> Picture:
    """Scale a picture until it covers a size, and cut out its centre, as the reference does.

    To get the reference's bits: sizes round half to even, Lanczos, a crop box in fractions of a pixel.

    Raises:
        RequestError: it is so long and narrow that scaling would take gigabytes.
    """
    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    scaled_height, scaled_width = covering_size(picture.shape[:2], size)
    scaled = Image.fromarray(
        resize(picture, (scaled_height, scaled_width), resample=Image.Resampling.LANCZOS)
    )
    # Fractions on purpose: Pillow rounds each edge by itself.
    box: Any = (
        (scaled_width - width) / 2,
        (scaled_height - height) / 2,
        (scaled_width + width) / 2,
        (scaled_height + height) / 2,
    )
    return np.array(scaled.crop(box))


def resize(picture: Picture, size: tuple[int, int], *, resample: Image.Resampling) -> Picture:
    """Scale a picture (H, W, 3) to a size (height, width), with the same bits in every version of Pillow.

    Pillow scales width and height one after the other and rounds in between. Since version 13, the height
    comes first if it shrinks by more than twice what the width does; before, it never did. Here it does.
    """
    height, width = size
    lost_height, lost_width = picture.shape[0] - height, picture.shape[1] - width
    scaled = Image.fromarray(picture)
    if lost_height > 0 and lost_height > 2 * lost_width:
        scaled = scaled.resize((scaled.width, height), resample).resize((width, height), resample)
    else:
        scaled = scaled.resize((width, scaled.height), resample).resize((width, height), resample)
    return np.array(scaled)


def write_picture(file: Path | BinaryIO, picture: Picture) -> None:
    """Write a picture (H, W, 3) as PNG."""
    Image.fromarray(picture).save(file, format="PNG")


def write_thumbnail(path: Path, target: Path) -> None:
    """Write a small JPEG of a picture, for people to know it by.

    Raises:
        RequestError: as ``open_picture``.
    """
    small = Image.fromarray(open_picture(path, tell=log.debug))
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.BILINEAR, reducing_gap=2.0)
    small.save(target, "JPEG", quality=82, progressive=True)


def count_frames(path: Path, look: "Callable[[int, VideoFrame], None] | None" = None) -> int:
    """Decode a whole video and count its frames; ``look`` is called with each frame's number and the frame.

    Raises:
        OSError, av.FFmpegError: it cannot be read.
    """
    import av

    count = 0
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if look is not None:
                look(count, frame)
            count += 1
    return count
