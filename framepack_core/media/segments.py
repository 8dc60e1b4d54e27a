"""Encodes a video in segments, each frame once, and joins them without encoding again.

A segment is a small mp4 that begins with a keyframe and refers to no frame outside of it. Segments of the
same size and quality can be joined in any order: packets are copied, only their times are shifted.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer

from framepack_core.media.pictures import Picture
from framepack_core.media.sizes import Size
from framepack_core.media.video_colours import Colours, from_rgb, of_codec, tag
from framepack_core.sections import FPS

ENCODER_THREADS = 2  # fixed: libx264 writes other bytes with another number of threads
# The macroblock tree of libx264 (core 165, AVX) reads memory it did not write: the same frames gave other
# bytes in up to 75 % of runs, depending on the width. Without it 760 of 760 runs over nine sizes were equal.
EXACT = "mbtree=0"
# For frames that are soon encoded again: 6 ms instead of 15 a frame of 640x608. The parameter sets must stay
# those of EXACT: with subme < 6 libx264 drops its psychovisual terms and with them a chroma offset of -2, so
# it is set here.
QUICK = f"{EXACT}:subme=1:me=dia:trellis=0:mixed-refs=0:rc-lookahead=10:chroma-qp-offset=-2"
HELD_BACK = 2  # frames by which decoding precedes showing: libx264 makes pyramids of three B-frames
FRAME = Fraction(1, FPS)  # seconds


class SegmentError(ValueError):
    """A segment is damaged, or cannot be joined with the others."""


def encode(
    frames: Iterable[Picture], *, size: Size, crf: int, options: str = EXACT, colours: Colours = "bt709"
) -> bytes:
    """Encode frames as a segment, H.264, yuv420p: the same bytes for the same frames; b"" for no frames.

    Segments in ``bt601`` have no colour tags: they can be joined only with segments of older versions.
    """
    file = io.BytesIO()
    given = 0
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "x264-params": options})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = ENCODER_THREADS
        if colours == "bt709":
            tag(stream.codec_context)
        for given, picture in enumerate(frames, start=1):  # noqa: B007 - counts them; 0 without frames
            container.mux(stream.encode(from_rgb(picture, colours)))
        container.mux(stream.encode(None))
    return file.getvalue() if given else b""


def encode_exactly(frames: Sequence[Picture]) -> bytes:
    """Encode frames without loss, as RGB: to continue from them, not to watch."""
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "rgb24"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def count(segment: bytes) -> int:
    """Count the frames of a segment, without decoding it."""
    if not segment:
        return 0
    with _opened(segment) as piece:
        return sum(1 for packet in piece.demux(piece.streams.video[0]) if packet.size)


def colours_of(segment: bytes) -> Colours:
    """Give the colours of a segment.

    Raises:
        SegmentError: it is damaged.
    """
    with _opened(segment) as piece:
        return of_codec(piece.streams.video[0].codec_context)


def join(path: Path, segments: Iterable[bytes], tags: Mapping[str, str] | None = None) -> int:
    """Write segments in the order of time as an mp4 with its index in front; return the number of frames.

    ``tags`` are its metadata, such as ``title`` and ``comment``. One segment at a time is in memory.

    Raises:
        SegmentError: one is damaged or was encoded with other settings, or all of them are empty.
        OSError, av.FFmpegError: the file cannot be written.
    """
    frames, parameters = 0, None
    with av.open(path, mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata.update(tags or {})
        for segment in filter(None, segments):
            with _opened(segment) as piece:
                source = piece.streams.video[0]
                if parameters is None:
                    parameters = source.codec_context.extradata
                    stream = container.add_stream_from_template(source)
                elif source.codec_context.extradata != parameters:
                    raise SegmentError("a segment was encoded with other settings than the first")
                packets = [packet for packet in piece.demux(source) if packet.size]
            for number, (packet, shown) in enumerate(zip(packets, _order(packets), strict=True)):
                packet.stream, packet.time_base, packet.duration = stream, FRAME, 1
                # Computed, not shifted: in a segment of one or two frames libx264 holds none back.
                packet.dts, packet.pts = frames + number - HELD_BACK, frames + shown
                container.mux(packet)
            frames += len(packets)
        if not frames:
            raise SegmentError("there are no frames to make a video of")
    return frames


def head(segment: bytes, like: bytes, most: int) -> bytes:
    """Cut the start of a segment, at a keyframe and after at most ``most`` frames; b"" if impossible.

    The result can be joined with segments such as ``like``.
    """
    try:
        with _opened(segment) as piece, _opened(like) as other:
            source = piece.streams.video[0]
            if source.codec_context.extradata != other.streams.video[0].codec_context.extradata:
                return b""
            packets = [packet for packet in piece.demux(source) if packet.size]
            places = _order(packets)
            ends = [len(places)] + [number for number, packet in enumerate(packets) if packet.is_keyframe]
            # Only cuts before which the same frames are decoded as are shown.
            whole = [end for end in ends if end <= most and sorted(places[:end]) == list(range(end))]
            file = io.BytesIO()
            with av.open(file, mode="w", format="mp4") as container:
                stream = container.add_stream_from_template(source)
                for packet in packets[: max(whole)]:
                    packet.stream = stream
                    container.mux(packet)
            return file.getvalue() if max(whole) else b""
    except SegmentError:
        return b""


@contextmanager
def _opened(segment: bytes) -> Iterator[InputContainer]:
    try:
        with av.open(io.BytesIO(segment), mode="r", format="mp4") as piece:
            yield piece
    except av.InvalidDataError as error:
        raise SegmentError(f"a segment is damaged: {error}") from error


def _order(packets: "list[av.Packet[Any]]") -> list[int]:
    """Give, for each packet, the position of its frame in the order of time."""
    places = [int((packet.pts or 0) * packet.time_base / FRAME) for packet in packets]
    whole = sorted(places) == list(range(len(places)))
    if (
        not whole
        or not packets
        or not packets[0].is_keyframe
        or any(place + HELD_BACK < number for number, place in enumerate(places))
    ):
        raise SegmentError(f"a segment is damaged: its {len(packets)} packets are of the frames {places}")
    return places
