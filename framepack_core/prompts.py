"""Shares timed prompts out to sections, and finds what of a prompt is cut off. No torch here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from framepack_core.errors import RequestError
from framepack_core.sections import FPS, Kind, chronological, frame_count

LONGEST_WORD = 40  # characters; what has no space for longer is not told from its beginning
MAX_DROPPED_WORDS, MAX_DROPPED = 8, 80  # characters


@dataclass(frozen=True)
class Cut:
    """A prompt that is too long for a text encoder."""

    text: str  # all of it
    encoder: Literal["llama", "clip"]
    tokens: int  # that the text has
    taken: int
    dropped: str  # the first words that the encoder does not see whole


def first_words(text: str, start: int) -> str:
    """Give the first words of what is dropped from ``start`` on, beginning with the word that lies there.

    >>> first_words("pan left, then zoom in", 12)
    'then zoom in'
    """
    start = len(text) - len(text[start:].lstrip())  # tokens begin with the space in front of their word
    begun = re.search(rf"(?<!\S)\S{{1,{LONGEST_WORD}}}\Z", text[:start])
    words = text[begun.start() if begun and text[start:] else start :].split()
    told = " ".join(words[:MAX_DROPPED_WORDS])
    return told if len(words) <= MAX_DROPPED_WORDS and len(told) <= MAX_DROPPED else told[:MAX_DROPPED] + "…"


class TimedPrompt(BaseModel):
    """A prompt for a part of the video, in seconds of the finished video: ``from``, ``to``, ``text``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True
    )

    start: float = Field(alias="from", ge=0, strict=True)
    end: float = Field(alias="to", ge=0, strict=True)
    text: str

    @property
    def span(self) -> str:
        """Name it in a message."""
        return f"from = {self.start:g}, to = {self.end:g}"


def _check(prompts: tuple[TimedPrompt, ...]) -> tuple[TimedPrompt, ...]:
    for prompt in prompts:
        if prompt.start >= prompt.end:
            raise ValueError(f"hold {prompt.span}, where 'to' must be greater than 'from'")
        if not prompt.text.strip():
            raise ValueError(f"hold an empty text ({prompt.span}): write one, or leave the entry out")
    for one, other in pairwise(sorted(prompts, key=lambda prompt: prompt.start)):
        if other.start < one.end:
            raise ValueError(
                f"hold {one.span} and {other.span}, which overlap: end the one where the other begins"
            )
    return prompts


TimedPrompts = Annotated[tuple[TimedPrompt, ...], AfterValidator(_check)]


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
    """Say of each prompt in which sections it acts; sections are numbered in the order they are made in.

    A section takes the prompt in whose span its middle lies, ``from`` included and ``to`` not; it is
    ``4 * window`` frames long, 1.2 s with the usual window of 9.

    Args:
        prompts: in any order, none over another.
        kind: of the model.
        sections: how many are made, of a clip.
        window: latent frames in each of them.
        asked: seconds the video was asked to have; its true length may be a little less.
        before: seconds of video that are there already and in front of what is made.
        clips: how many are made one after the other, each beginning with the last frame of the one before.

    Raises:
        RequestError: one ends behind the video, or acts in no section.
    """
    length = before + frame_count(clips * sections, window) / FPS
    own = 4 * window / FPS
    # Rounded: 1.2 * 1.5 is a little less than the 1.8 that people write.
    middles = [round(before + own * (number + 0.5), 6) for number in range(clips * sections)]
    order = chronological(kind, range(sections))  # of a clip, in the order of time
    numbers = [first + number for first in range(0, clips * sections, sections) for number in order]
    acting = []
    for prompt in prompts:
        if prompt.end > max(length, before + clips * asked) + 1e-6:
            raise RequestError(
                f"prompts: {prompt.span} ends behind the video, which has {length:.2f} s: "
                "'to' must not be greater, or the video longer (seconds)"
            )
        found = [
            number
            for number, middle in zip(numbers, middles, strict=True)
            if prompt.start <= middle < prompt.end
        ]
        if not found:
            raise RequestError(
                f"prompts: {prompt.span} acts in no section: what is made lies from {before:.2f} to "
                f"{length:.2f} s, in sections of {own:.2f} s, and the span must hold the middle of one "
                f"({_listed(middles)} s)"
            )
        acting.append(sorted(found))
    return acting


def _listed(times: Sequence[float], shown: int = 6) -> str:
    return ", ".join([f"{time:.2f}" for time in times[:shown]] + ["…"] * (len(times) > shown))
