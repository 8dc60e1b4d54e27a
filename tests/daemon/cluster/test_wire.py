"""Frames: what is sent arrives whole and in order, and what is no frame is refused."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framepackd.cluster import wire
from framepackd.cluster.wire import PART_BYTES, Frame, Wire, WireError, packed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text(max_size=8), JSON, max_size=4).map(lambda header: header | {"kind": "Kept"})


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    ours, theirs = map(Wire, socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=300)), max_size=8))
def test_frames_arrive_as_they_were_sent_and_in_order(frames: list[tuple[dict[str, object], bytes]]) -> None:
    ours, theirs = map(Wire, socket.socketpair())
    for header, body in frames:
        ours.send(header, body)
    ours.shut()
    got = []
    with contextlib.suppress(EOFError):
        while frame := theirs.receive(5):
            got.append(frame)
    ours.close()
    theirs.close()
    assert got == [Frame(header, body) for header, body in frames]


def test_a_part_of_the_largest_size_passes_while_the_other_end_sends_too(ends: tuple[Wire, Wire]) -> None:
    ours, theirs = ends
    part = bytes(PART_BYTES)
    senders = [threading.Thread(target=end.send, args=({"kind": "Part"}, part)) for end in ends]
    for sender in senders:
        sender.start()
    assert ours.receive(20) == theirs.receive(20) == Frame({"kind": "Part"}, part)
    for sender in senders:
        sender.join()


def test_nothing_arrives_in_time_while_a_frame_is_not_whole(ends: tuple[Wire, Wire]) -> None:
    ours, theirs = ends
    frame = packed({"kind": "Kept"}, b"content")
    ours.send_packed(frame[:-1])
    assert theirs.receive(0.05) is None
    ours.send_packed(frame[-1:])
    assert theirs.receive(5) == Frame({"kind": "Kept"}, b"content")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\xff" * 8, "longer than"),
        (b"\0\0\0\2\0\0\0\0[]", "no kind"),
        (b'\0\0\0\x0a\0\0\0\0{"kind":1}', "no kind"),
        (b"\0\0\0\1\0\0\0\0{", "no JSON"),
        (b"\0\1\0\0\0\0\0\0" + b"[" * (1 << 16), "no JSON"),
    ],
)
def test_what_is_no_frame_is_refused_with_what_it_is(ends: tuple[Wire, Wire], sent: bytes, said: str) -> None:
    ours, theirs = ends
    ours.send_packed(sent)
    with pytest.raises(WireError, match=said):
        theirs.receive(5)


def test_too_long_a_part_is_refused_before_it_is_sent(ends: tuple[Wire, Wire]) -> None:
    with pytest.raises(WireError, match="longer than"):
        ends[0].send({"kind": "Part"}, bytes(PART_BYTES + 1))
    with pytest.raises(WireError, match="longer than"):
        packed({"kind": "x", "text": "y" * wire.MAX_HEADER_BYTES})
