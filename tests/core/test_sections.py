"""Properties of every plan and every history, for all lengths and windows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from framepack_core.history import History, prefix_for
from framepack_core.sections import (
    HISTORY_FRAMES,
    Kind,
    frame_count,
    paddings,
    plan,
    section_count,
)

kinds = st.sampled_from(["framepack", "f1"])
windows = st.integers(1, 33)
counts = st.integers(1, 60)


@given(seconds=st.floats(1, 120), window=windows)
def test_the_length_is_within_half_a_section_of_what_was_asked_or_one_section(
    seconds: float, window: int
) -> None:
    frames = frame_count(section_count(seconds, window), window) - 1
    assert abs(frames - seconds * 30) <= 2 * window + 1e-6 or frames == 4 * window


@given(sections=counts)
def test_paddings_never_grow_and_end_at_zero(sections: int) -> None:
    planned = paddings(sections)
    assert len(planned) == sections
    assert planned == sorted(planned, reverse=True)
    assert planned[-1] == 0
    assert planned.count(0) == 1
    assert max(planned) <= 3


@given(kind=kinds, sections=counts, window=windows)
def test_every_index_of_a_section_is_used_once_and_history_has_its_lengths(
    kind: Kind, sections: int, window: int
) -> None:
    planned = plan(kind, sections, window)
    assert [section.index for section in planned] == list(range(sections))
    assert [section.is_last for section in planned] == [False] * (sections - 1) + [True]
    for section in planned:
        runs = (
            section.indices_latents,
            section.indices_latents_clean,
            section.indices_latents_history_2x,
            section.indices_latents_history_4x,
        )
        used = [index for run in runs for index in run]
        assert len(used) == len(set(used)) == window + 2 + 2 + 16
        assert section.indices_latents_clean[0] == 0, "the picture is where time begins"
        blank = (section.padding or 0) * window
        assert set(range(max(used) + 1)) - set(used) == set(range(1, 1 + blank))


@given(kind=kinds, sections=st.integers(1, 6), window=st.integers(1, 6))
def test_history_holds_the_video_in_the_order_of_time(kind: Kind, sections: int, window: int) -> None:
    """Latent frames are numbered by their time in the video; the picture is 0."""
    start = torch.zeros(1, 1, 1, 1, 1)
    history = History(kind, window, start)
    total = sections * window + 1
    for section in plan(kind, sections, window):
        context = history.context(start)
        assert [part.shape[2] for part in context] == [2, 2, 16]
        first = 1 + section.index * window if kind == "f1" else total - (section.index + 1) * window
        history.append(
            section, torch.arange(first, first + window, dtype=torch.float32).reshape(1, 1, -1, 1, 1)
        )
        decoded = history.decodable(section).flatten().tolist()
        assert decoded == list(range(int(decoded[0]), int(decoded[0]) + len(decoded))), "no gap, no jump"
        assert first in decoded
        still = (
            decoded[history.still_index(section)]
            if kind == "f1"
            else decoded[history.still_index(section) // 4]
        )
        assert still == first + window - 1, "a still shows the section it names"
    assert history.generated == total
    assert history.latents.shape[2] <= max(HISTORY_FRAMES, 2 * window + 1), "however long the video is"


def test_a_sections_history_begins_with_the_nearest_frames() -> None:
    start = torch.full((1, 1, 1, 1, 1), -1.0)
    for kind, nearest in (("framepack", [100.0]), ("f1", [102.0])):
        history = History(kind, 3, start)
        sections = plan(kind, 3, 3)
        history.append(sections[0], torch.tensor([100.0, 101.0, 102.0]).reshape(1, 1, 3, 1, 1))
        context = history.context(start)
        assert context.latents_clean.flatten().tolist() == [-1.0, *nearest], kind


def test_an_end_frame_is_seen_first_pushed_back_and_never_decoded() -> None:
    start, end = torch.zeros(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 9.0)
    history = History("framepack", 9, start, end)
    places = []
    for section in plan("framepack", 3, 9):
        context = torch.cat([part.flatten() for part in history.context(start)])
        places.append((context == 9).nonzero().flatten().tolist())
        history.append(section, torch.ones(1, 1, 9, 1, 1))
        assert 9 not in history.decodable(section)
    # Among clean (2), 2x (2) and 4x (16) frames: nearest, 4x, gone behind what is looked back on.
    assert places == [[1], [10], [19]]


def test_a_keyframe_serves_its_section_and_those_made_before_it() -> None:
    start, keyframes = torch.zeros(1), {0: torch.ones(1), 2: torch.full((1,), 2.0)}
    chosen = [prefix_for(section, start, keyframes).item() for section in plan("framepack", 4, 9)]
    assert chosen == [1, 2, 2, 0]
