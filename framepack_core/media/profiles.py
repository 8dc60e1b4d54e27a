"""Converts a picture's colours to sRGB by its ICC profile, with Pillow's littleCMS."""

import io
import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageCms

MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of pictures, by the colour spaces of profiles
SAME = 2  # levels of 255: profiles that round sRGB's curve or primaries differ from it by no more
GRID = (*range(0, 255, 32), 255)


class ProfileError(Exception):
    """A profile cannot be used; the text says why."""


def converter(profile: bytes, space: str) -> Callable[[Image.Image], Image.Image]:
    """Give the conversion of pictures of mode L, RGB or CMYK to sRGB; the identity if the profile is sRGB.

    ``space`` is the colour space of the file: "GRAY", "RGB", "CMYK", or "P", which takes no profile.

    Raises:
        ProfileError: the profile is damaged, or of another colour space than the picture.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = source.profile.xcolor_space.strip()
        if found == space and space in MODES:
            if _changes_nothing(source, MODES[space]):
                return lambda image: image
            return _transform(source, MODES[space], ImageCms.Intent.PERCEPTUAL).apply
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        raise ProfileError(f"it is damaged ({error})") from error
    names = {"GRAY": "grey", "P": "a palette"}
    raise ProfileError(
        f"it is for {names.get(found, found)}, and the picture is of {names.get(space, space)}"
    )


def _transform(
    source: ImageCms.ImageCmsProfile, mode: str, intent: ImageCms.Intent
) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(source, _srgb(), mode, "RGB", intent)


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(source: ImageCms.ImageCmsProfile, mode: str) -> bool:
    """Return whether a profile is sRGB, measured by its effect: sRGB profiles have dozens of names."""
    if mode == "CMYK":
        return False
    colours = _samples()
    samples = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
    # Colorimetric: the perceptual table of the ICC's own sRGB profile differs from sRGB.
    made = np.asarray(_transform(source, mode, ImageCms.Intent.RELATIVE_COLORIMETRIC).apply(samples))
    expected = colours if mode == "RGB" else colours[..., :1]
    return bool(np.abs(made.astype(int) - expected).max() <= SAME)


@cache
def _samples() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Give colours (1, N, 3): a grid over the RGB cube, and all greys."""
    greys = [(level, level, level) for level in range(256)]
    return np.array([[*itertools.product(GRID, repeat=3), *greys]], np.uint8)
