"""Videos of one colour, coded and tagged with any matrix."""

from pathlib import Path

import av

# As H.273 and FFmpeg number them.
BT709, UNSPECIFIED, SMPTE170M, BT2020 = 1, 2, 6, 9
# The luma weights of red and blue.
WEIGHTS = {BT709: (0.2126, 0.0722), SMPTE170M: (0.299, 0.114), BT2020: (0.2627, 0.0593)}

LIMITED, FULL = 1, 2


def film(
    path: Path,
    colour: tuple[int, int, int],
    *,
    tagged: int,
    coded: int,
    colour_range: int = LIMITED,
    size: tuple[int, int] = (96, 160),
    transfer: int = UNSPECIFIED,
    count: int = 3,
) -> Path:
    """Write a video of one colour, ``coded`` by one matrix and ``tagged`` with another or the same."""
    planes = yuv(colour, coded, colour_range)
    height, width = size
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc = tagged, colour_range, transfer
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane, level in zip(frame.planes, planes, strict=True):
            plane.update(bytes([level]) * (plane.line_size * plane.height))
        for number in range(count):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def yuv(colour: tuple[int, int, int], matrix: int, colour_range: int) -> tuple[int, int, int]:
    """Convert a colour by the formula of the standards, as a test's expectation."""
    red, green, blue = (level / 255 for level in colour)
    of_red, of_blue = WEIGHTS[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = (blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)
    low, span, chroma_span = (16, 219, 224) if colour_range == LIMITED else (0, 255, 255)
    return (
        round(low + span * luma),
        round(128 + chroma_span * chroma[0]),
        round(128 + chroma_span * chroma[1]),
    )
