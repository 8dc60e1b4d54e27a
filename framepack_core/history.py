"""The latents a section looks back on, and those that are decoded after it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from framepack_core.sections import HISTORY_1X, HISTORY_2X, HISTORY_4X, HISTORY_FRAMES, Kind, Section


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


class Shared(NamedTuple):
    """Latents that the windows decoded after two sections have in common."""

    first: int  # in the window of the earlier section
    frames: int
    first_later: int  # in the window of the later section

    def cut_alike(self, start: int, length: int, stride: int) -> bool:
        """Say whether a tile of the earlier window is one of the later window too, cut every ``stride``."""
        inside = self.first <= start and start + length <= self.first + self.frames
        return inside and (start - self.first + self.first_later) % stride == 0


class History:
    """The latents generated last, float32 on the CPU, with 19 frames to look back on at first.

    In ``framepack`` the newest material is at the front (it is the earliest of the video) and the
    end frame, if there is one, takes the place of the nearest of the 19; it stays in the buffer and is
    pushed back section by section, but is never decoded. In ``f1`` the newest is at the end, behind
    the picture. What no section looks back on any more, and none is decoded with, is let go.
    """

    def __init__(
        self,
        kind: Kind,
        window: int,
        start_latents: torch.Tensor,
        end_latents: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> None:
        """Begin with the picture's latents (1, 16, 1, h, w).

        With ``before``, (1, 16, T, h, w), which only goes forward, begin with these instead: a video that is
        gone on with.
        """
        self._forward = kind == "f1"
        self._window = window
        self.start = start_latents if before is None else before
        self._kept = max(HISTORY_FRAMES, 2 * window + 1)
        batch, channels, _, height, width = start_latents.shape
        self.latents = torch.zeros(batch, channels, HISTORY_FRAMES, height, width)
        self.generated = 0  # latent frames of the video so far
        if self._forward:
            self.latents = torch.cat([self.latents, self.start], dim=2)[:, :, -self._kept :]
            self.generated = self.start.shape[2]
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
            self.latents = torch.cat([self.latents, latents], dim=2)[:, :, -self._kept :]
        else:
            if section.is_last:
                latents = torch.cat([self.start, latents], dim=2)
            self.latents = torch.cat([latents, self.latents], dim=2)[:, :, : self._kept]
        self.generated += latents.shape[2]

    def decodable(self, section: Section) -> torch.Tensor:
        """Give the latents to decode after a section: its own and, to blend with, its neighbour's."""
        frames = 2 * self._window + (1 if section.is_last and not self._forward else 0)
        frames = min(frames, self.generated)
        return self.latents[:, :, -frames:] if self._forward else self.latents[:, :, :frames]

    def shared(self, section: Section, following: Section) -> Shared:
        """Say which of the latents decoded after a section are decoded again after the following one."""
        if self._forward:
            return Shared(self.decodable(section).shape[2] - self._window, self._window, 0)
        return Shared(0, self._window, self._window + (1 if following.is_last else 0))

    def still_index(self, section: Section) -> int:
        """Say which of the pictures decoded after a section is that section's own last one."""
        if self._forward:
            return -1
        own_latents = self._window + (1 if section.is_last else 0)
        return 4 * (own_latents - 1)
