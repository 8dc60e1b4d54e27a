"""Converts RGB to the colours of mp4 files (BT.709) and back.

New videos are BT.709 in limited range and tagged as such, so that all players show them alike. For untagged
videos players guess. Videos of our older versions are BT.601 and untagged.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
from av import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from framepack_core.errors import RequestError
from framepack_core.media.pictures import Picture
from framepack_core.media.sizes import Size

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

Colours = Literal["bt709", "bt601"]
# Numbers of ITU-T H.273, the same for primaries, transfer and matrix.
_BT709, _UNSPECIFIED = 1, 2
_MATRICES: dict[Colours, Colorspace] = {"bt709": Colorspace.ITU709, "bt601": Colorspace.ITU601}
HD_LINES = 720  # from this height on players take an untagged video for BT.709
HDR = {16: "HDR10 (PQ)", 18: "HLG"}  # transfers, by their numbers in H.273


def tag(context: "VideoCodecContext") -> None:
    """Set an encoder's colour tags to BT.709 in limited range."""
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG


def of_codec(context: "VideoCodecContext") -> Colours:
    """Give the colours of a video that this or an older version of ours made."""
    return "bt601" if context.colorspace == _UNSPECIFIED else "bt709"


def refuse_hdr(context: "VideoCodecContext") -> None:
    """Refuse a video of high dynamic range, because it would look pale if read as SDR.

    Raises:
        RequestError: it is one; the caller puts the file's name before the text.
    """
    if context.color_trc in HDR:
        raise RequestError(f"is an HDR video ({HDR[context.color_trc]}): save it as SDR and drop it again")


def from_rgb(picture: Picture, colours: Colours) -> VideoFrame:
    """Convert a picture (H, W, 3) to a frame in yuv420p with limited range."""
    frame = VideoFrame.from_ndarray(picture, format="rgb24")
    # Name both ranges: PyAV 16 assumes limited range for RGB.
    return frame.reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=_MATRICES[colours],
        dst_color_range=ColorRange.MPEG,
    )


def to_rgb(frame: VideoFrame, untagged: Colours | None = None, size: Size | None = None) -> Picture:
    """Convert a frame to a picture (H, W, 3), by its colour tags.

    Args:
        frame: a decoded frame.
        untagged: its colours if it has no tags; None to guess by its height, as players do.
        size: height and width to scale it down to.
    """
    matrix = None
    if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb:
        guessed: Colours = "bt709" if frame.height >= HD_LINES else "bt601"
        matrix = _MATRICES[untagged or guessed]
    height, width = size or (frame.height, frame.width)
    rgb = frame.reformat(
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=matrix,
        src_color_range=frame.color_range,
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.AREA if size else Interpolation.BILINEAR,
    )
    return np.ascontiguousarray(rgb.to_ndarray(), np.uint8)
