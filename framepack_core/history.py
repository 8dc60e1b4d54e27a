"""Keeps the latents that condition the next section, and those that are decoded after it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from framepack_core.sections import HISTORY_1X, HISTORY_2X, HISTORY_4X, HISTORY_FRAMES, Kind, Section


def prefix_for(
    section: Section, start_latents: torch.Tensor, keyframe_latents: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Choose the first clean latent: the nearest keyframe at or after the section, else the start picture."""
    at_or_after = [number for number in keyframe_latents if number >= section.index]
    return keyframe_latents[min(at_or_after)] if at_or_after else start_latents


class HistoryContext(NamedTuple):
    """The history that a section is conditioned on, each (1, 16, T, h, w), float32."""

    latents_clean: torch.Tensor  # T = 2: picture or keyframe, nearest frame
    latents_history_2x: torch.Tensor  # T = 2
    latents_history_4x: torch.Tensor  # T = 16


class Shared(NamedTuple):
    """The latents that two successive decoding windows have in common, as positions in each."""

    first: int  # in the window of the earlier section
    frames: int
    first_later: int  # in the window of the later section

    def cut_alike(self, start: int, length: int, stride: int) -> bool:
        """Return whether a tile of the earlier window is also in the later one, cut every ``stride``."""
        inside = self.first <= start and start + length <= self.first + self.frames
        return inside and (start - self.first + self.first_later) % stride == 0


class History:
    """The latents generated last, float32 on the CPU; begins with 19 blank frames.

    In ``framepack`` the newest latents are at the front, because they are the earliest of the video. An end
    frame replaces the nearest of the 19 blank ones; each section pushes it further back, and it is never
    decoded. In ``f1`` the newest latents are at the end, after the picture. Latents that neither conditioning
    nor decoding needs any more are dropped.
    """

    def __init__(
        self,
        kind: Kind,
        window: int,
        start_latents: torch.Tensor,
        end_latents: torch.Tensor | None = None,
        existing: torch.Tensor | None = None,
    ) -> None:
        """Begin with the picture's latents (1, 16, 1, h, w).

        In ``f1``, ``existing`` (1, 16, T, h, w) are the latents of a video that is extended: they replace the
        picture's.
        """
        self._forward = kind == "f1"
        self._window = window
        self.start = start_latents if existing is None else existing
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
        """Give the history of the next section; ``prefix`` becomes the first clean latent."""
        if self._forward:
            recent = self.latents[:, :, -HISTORY_FRAMES:]
            history_4x, history_2x, nearest = torch.split(recent, [HISTORY_4X, HISTORY_2X, HISTORY_1X], 2)
        else:
            recent = self.latents[:, :, :HISTORY_FRAMES]
            nearest, history_2x, history_4x = torch.split(recent, [HISTORY_1X, HISTORY_2X, HISTORY_4X], 2)
        return HistoryContext(torch.cat([prefix, nearest], dim=2), history_2x, history_4x)

    def append(self, section: Section, latents: torch.Tensor) -> None:
        """Add a finished section (1, 16, W, h, w), and in ``framepack`` the picture with the last section."""
        if self._forward:
            self.latents = torch.cat([self.latents, latents], dim=2)[:, :, -self._kept :]
        else:
            if section.is_last:
                latents = torch.cat([self.start, latents], dim=2)
            self.latents = torch.cat([latents, self.latents], dim=2)[:, :, : self._kept]
        self.generated += latents.shape[2]

    def decodable(self, section: Section) -> torch.Tensor:
        """Give the latents to decode after a section: its own, and its neighbour's for blending."""
        frames = 2 * self._window + (1 if section.is_last and not self._forward else 0)
        frames = min(frames, self.generated)
        return self.latents[:, :, -frames:] if self._forward else self.latents[:, :, :frames]

    def shared(self, section: Section, following: Section) -> Shared:
        """Give the latents of a section's decoding window that the window of the following one repeats."""
        if self._forward:
            return Shared(self.decodable(section).shape[2] - self._window, self._window, 0)
        return Shared(0, self._window, self._window + (1 if following.is_last else 0))

    def still_index(self, section: Section) -> int:
        """Give the index, among the frames decoded after a section, of the section's own last frame."""
        if self._forward:
            return -1
        own_latents = self._window + (1 if section.is_last else 0)
        return 4 * (own_latents - 1)
