"""Converts RGB to the colours of mp4 files (BT.709) and back.

What people see is BT.709 of limited range, and says so: players show it alike at every size. Of a video that
says nothing they guess. Those of older versions of ours are BT.601 without saying so.
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
# As ITU-T H.273 numbers them: BT.709 for primaries, transfer and matrix alike; "unspecified" for all three.
_BT709, _UNSPECIFIED = 1, 2
_MATRICES: dict[Colours, Colorspace] = {"bt709": Colorspace.ITU709, "bt601": Colorspace.ITU601}
HD_LINES = 720  # from here on players take a video that says nothing for BT.709
HDR = {16: "HDR10 (PQ)", 18: "HLG"}  # transfers that H.273 numbers so


def tag(context: "VideoCodecContext") -> None:
    """Have an encoder write that its frames are BT.709 of limited range."""
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG


def of_codec(context: "VideoCodecContext") -> Colours:
    """Say which colours a video of ours has, made by this version or an older one."""
    return "bt601" if context.colorspace == _UNSPECIFIED else "bt709"


def refuse_hdr(context: "VideoCodecContext") -> None:
    """Check that a video is not of high dynamic range: read as any other it would be pale.

    Raises:
        RequestError: it is; the text goes on after its name.
    """
    if context.color_trc in HDR:
        raise RequestError(f"is an HDR video ({HDR[context.color_trc]}): save it as SDR and drop it again")


def from_rgb(picture: Picture, colours: Colours) -> VideoFrame:
    """Convert a picture (H, W, 3) to a frame in yuv420p of limited range."""
    frame = VideoFrame.from_ndarray(picture, format="rgb24")
    # The ranges are said: PyAV 16 takes what is not said of RGB for limited.
    return frame.reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=_MATRICES[colours],
        dst_color_range=ColorRange.MPEG,
    )


def to_rgb(frame: VideoFrame, untagged: Colours | None = None, size: Size | None = None) -> Picture:
    """Convert a frame to a picture (H, W, 3), by what it says of its colours.

    Args:
        frame: as it was decoded.
        untagged: what it is if it says nothing; None to guess by its lines, as players do.
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
