"""Plans a video: how many sections it has, the frame indices of each, and which prompt acts in it.

FramePack generates a video in sections of ``latent_window_size`` (W) latent frames. Each section sees
two clean latent frames, two packed 2x and sixteen packed 4x. The two published models differ in
direction only:

* ``framepack`` makes the end of the video first and works towards the picture,
* ``f1`` starts at the picture and works forward.

The index layouts are those of lllyasviel/FramePack (demo_gradio.py, demo_gradio_f1.py). No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from framepack_core.errors import RequestError
from framepack_core.request import TimedPrompt

Kind = Literal["framepack", "f1"]
_Part = TypeVar("_Part")

FPS = 30
HISTORY_1X, HISTORY_2X, HISTORY_4X = 1, 2, 16  # latent frames of history, by how far they are packed
HISTORY_FRAMES = HISTORY_1X + HISTORY_2X + HISTORY_4X


@dataclass(frozen=True)
class Section:
    """One planned section; indices are positions in time for the rotary embedding."""

    index: int  # in generation order
    padding: int | None  # windows left blank between the picture and this section; None in F1
    is_last: bool
    indices_latents: tuple[int, ...]
    indices_latents_clean: tuple[int, int]
    indices_latents_history_2x: tuple[int, ...]
    indices_latents_history_4x: tuple[int, ...]


def chronological(kind: Kind, parts: Sequence[_Part]) -> Sequence[_Part]:
    """Sort the parts that sections made from generation order into the order of time.

    >>> chronological("framepack", ["end", "middle", "start"])
    ['start', 'middle', 'end']
    """
    return parts[::-1] if kind == "framepack" else parts


def section_count(seconds: float, window: int) -> int:
    """Count the sections of a video; a half rounds to the even neighbour, as in the reference.

    >>> [section_count(seconds, 9) for seconds in (1, 1.8, 3.0, 4.2, 5)]
    [1, 2, 2, 4, 4]
    """
    return max(round(seconds * FPS / (4 * window)), 1)


def frame_count(sections: int, window: int) -> int:
    """Count the frames of the finished video; the same for both kinds.

    >>> frame_count(section_count(5, 9), 9)
    145
    """
    return 4 * window * sections + 1


def paddings(sections: int) -> list[int]:
    """List, for each section in generation order, how many windows are left blank before it.

    >>> paddings(3), paddings(6)
    ([2, 1, 0], [3, 2, 2, 2, 1, 0])
    """
    if sections > 4:
        return [3] + [2] * (sections - 3) + [1, 0]
    return list(reversed(range(sections)))


def plan(kind: Kind, sections: int, window: int) -> list[Section]:
    """Plan the sections of a video in generation order."""
    if kind == "f1":
        return [_plan_forward(index, sections, window) for index in range(sections)]
    return [_plan_backward(index, padding, window) for index, padding in enumerate(paddings(sections))]


def _plan_backward(index: int, padding: int, window: int) -> Section:
    start, _, latents, clean, history_2x, history_4x = _deal(
        1, padding * window, window, HISTORY_1X, HISTORY_2X, HISTORY_4X
    )
    return Section(
        index=index,
        padding=padding,
        is_last=padding == 0,
        indices_latents=latents,
        indices_latents_clean=(start[0], clean[0]),
        indices_latents_history_2x=history_2x,
        indices_latents_history_4x=history_4x,
    )


def _plan_forward(index: int, sections: int, window: int) -> Section:
    start, history_4x, history_2x, clean, latents = _deal(1, HISTORY_4X, HISTORY_2X, HISTORY_1X, window)
    return Section(
        index=index,
        padding=None,
        is_last=index == sections - 1,
        indices_latents=latents,
        indices_latents_clean=(start[0], clean[0]),
        indices_latents_history_2x=history_2x,
        indices_latents_history_4x=history_4x,
    )


def _deal(*counts: int) -> list[tuple[int, ...]]:
    """Deal out 0, 1, 2, ... in runs of the given lengths."""
    runs, first = [], 0
    for count in counts:
        runs.append(tuple(range(first, first + count)))
        first += count
    return runs


def sections_of(
    prompts: Sequence[TimedPrompt],
    kind: Kind,
    sections: int,
    window: int,
    *,
    asked: float = 0.0,
    before: float = 0.0,
    clips: int = 1,
) -> list[list[int]]:
    """List, for each timed prompt, the sections in which it acts; sections count in generation order.

    A section takes the prompt whose span holds the middle of the section (``from`` included, ``to`` not). A
    section has ``4 * window`` frames, 1.2 s with the default window of 9.

    Args:
        prompts: in any order, without overlaps.
        kind: of the model.
        sections: how many each clip has.
        window: latent frames of a section.
        asked: requested seconds; the video may be slightly shorter.
        before: seconds of the video that is extended.
        clips: length of the chain; each clip begins with the last frame of the clip before.

    Raises:
        RequestError: a prompt ends after the video, or acts in no section.
    """
    length = before + frame_count(clips * sections, window) / FPS
    own = 4 * window / FPS
    # Rounded: as floats, 1.2 * 1.5 is a little less than the 1.8 that people write.
    middles = [round(before + own * (number + 0.5), 6) for number in range(clips * sections)]
    order = chronological(kind, range(sections))  # of one clip
    numbers = [first + number for first in range(0, clips * sections, sections) for number in order]
    acting = []
    for prompt in prompts:
        if prompt.end > max(length, before + clips * asked) + 1e-6:
            raise RequestError(
                f"prompts: {prompt.span} ends after the video, which has {length:.2f} s: "
                "lower 'to', or set seconds higher"
            )
        found = [
            number
            for number, middle in zip(numbers, middles, strict=True)
            if prompt.start <= middle < prompt.end
        ]
        if not found:
            raise RequestError(
                f"prompts: {prompt.span} acts in no section: sections of {own:.2f} s are made from "
                f"{before:.2f} to {length:.2f} s, and the span must hold the middle of one "
                f"({_list(middles)} s)"
            )
        acting.append(sorted(found))
    return acting


def _list(times: Sequence[float], shown: int = 6) -> str:
    return ", ".join([f"{time:.2f}" for time in times[:shown]] + ["…"] * (len(times) > shown))
