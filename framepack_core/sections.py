"""The plan of a video: its sections, their frame indices and the history each one looks back on.

FramePack generates a video in sections of ``latent_window_size`` (W) latent frames. Each section sees
two clean latent frames, two packed 2x and sixteen packed 4x. The two published models differ in
direction only:

* ``framepack`` makes the end of the video first and works towards the picture,
* ``f1`` starts at the picture and works forward.

The index layouts are those of lllyasviel/FramePack (demo_gradio.py, demo_gradio_f1.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Kind = Literal["framepack", "f1"]

FPS = 30
HISTORY_1X, HISTORY_2X, HISTORY_4X = 1, 2, 16  # latent frames looked back on, by how far they are packed
HISTORY_FRAMES = HISTORY_1X + HISTORY_2X + HISTORY_4X


@dataclass(frozen=True)
class Section:
    """The plan of one section; indices are positions in time for the rotary embedding."""

    index: int  # in generation order
    padding: int | None  # windows left blank between the picture and this section; None in F1
    is_last: bool
    indices_latents: tuple[int, ...]
    indices_latents_clean: tuple[int, int]
    indices_latents_history_2x: tuple[int, ...]
    indices_latents_history_4x: tuple[int, ...]


def section_count(seconds: float, window: int) -> int:
    """Count the sections of a video; a half is rounded to the even neighbour, as the reference does.

    >>> [section_count(seconds, 9) for seconds in (1, 1.8, 3.0, 4.2, 5)]
    [1, 2, 2, 4, 4]
    """
    return max(round(seconds * FPS / (4 * window)), 1)


def frame_count(sections: int, window: int) -> int:
    """Count the frames of the finished video, in both directions.

    >>> frame_count(section_count(5, 9), 9)
    145
    """
    return 4 * window * sections + 1


def paddings(sections: int) -> list[int]:
    """List, per section in generation order, how many windows are left blank before it.

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


def prefix_for(
    section: Section, start_latents: torch.Tensor, keyframe_latents: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Choose the first clean latent: the nearest keyframe at or after the section, else the picture."""
    at_or_after = [number for number in keyframe_latents if number >= section.index]
    return keyframe_latents[min(at_or_after)] if at_or_after else start_latents


class HistoryContext(NamedTuple):
    """What a section looks back on, each (1, 16, T, h, w), float32."""

    latents_clean: torch.Tensor  # T = 2: picture or keyframe, nearest frame
    latents_history_2x: torch.Tensor  # T = 2
    latents_history_4x: torch.Tensor  # T = 16


class History:
    """The latents generated so far, float32 on the CPU, with 19 frames to look back on at first.

    In ``framepack`` the newest material is at the front (it is the earliest of the video) and the
    end frame, if there is one, takes the place of the nearest of the 19; it stays in the buffer and is
    pushed back section by section, but is never decoded. In ``f1`` the newest is at the end, behind
    the picture.
    """

    def __init__(
        self,
        kind: Kind,
        window: int,
        start_latents: torch.Tensor,
        end_latents: torch.Tensor | None = None,
    ) -> None:
        """Begin with nothing but the picture's latents (1, 16, 1, h, w)."""
        self._forward = kind == "f1"
        self._window = window
        self._start = start_latents
        batch, channels, _, height, width = start_latents.shape
        self.latents = torch.zeros(batch, channels, HISTORY_FRAMES, height, width)
        self.generated = 0  # latent frames of the video that the buffer holds
        if self._forward:
            self.latents = torch.cat([self.latents, start_latents], dim=2)
            self.generated = 1
        elif end_latents is not None:
            self.latents[:, :, :1] = end_latents

    def context(self, prefix: torch.Tensor) -> HistoryContext:
        """Give what the next section looks back on; ``prefix`` becomes the first clean latent."""
        if self._forward:
            recent = self.latents[:, :, -HISTORY_FRAMES:]
            history_4x, history_2x, nearest = torch.split(recent, [HISTORY_4X, HISTORY_2X, HISTORY_1X], 2)
        else:
            recent = self.latents[:, :, :HISTORY_FRAMES]
            nearest, history_2x, history_4x = torch.split(recent, [HISTORY_1X, HISTORY_2X, HISTORY_4X], 2)
        return HistoryContext(torch.cat([prefix, nearest], dim=2), history_2x, history_4x)

    def append(self, section: Section, latents: torch.Tensor) -> None:
        """Take in a finished section (1, 16, W, h, w); the last one backward brings the picture along."""
        if self._forward:
            self.latents = torch.cat([self.latents, latents], dim=2)
        else:
            if section.is_last:
                latents = torch.cat([self._start, latents], dim=2)
            self.latents = torch.cat([latents, self.latents], dim=2)
        self.generated += latents.shape[2]

    def decodable(self, section: Section) -> torch.Tensor:
        """Give the latents to decode after a section: its own and, to blend with, its neighbour's."""
        if self._forward:
            video = self.latents[:, :, -self.generated :]
            return video if section.index == 0 else video[:, :, -2 * self._window :]
        video = self.latents[:, :, : self.generated]
        frames = (2 * self._window + 1) if section.is_last else (2 * self._window)
        return video if section.index == 0 else video[:, :, :frames]

    def still_index(self, section: Section) -> int:
        """Say which of the pictures decoded after a section is that section's own last one."""
        if self._forward:
            return -1
        own_latents = self._window + (1 if section.is_last else 0)
        return 4 * (own_latents - 1)
