"""Warns of what does not stop a job: prompts that are cut, LoRAs that fit only in part."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from framepack_core.request import Cut


class CutPrompt(TypedDict):
    """A prompt that is too long for a text encoder, as the column ``cuts`` holds it."""

    key: str  # of the job's settings
    encoder: str
    tokens: int
    taken: int
    dropped: str


def recorded(settings: Mapping[str, Any], cuts: Iterable[Cut]) -> list[CutPrompt]:
    """Turn the worker's report of cut prompts into what the job records of them."""
    timed = enumerate(settings.get("prompts", ()))
    keys = {entry["text"]: f"prompts.{number}" for number, entry in timed}
    keys |= {settings.get(key): key for key in ("negative_prompt", "prompt")}
    return [
        {
            "key": keys.get(cut.text, "prompt"),
            "encoder": cut.encoder,
            "tokens": cut.tokens,
            "taken": cut.taken,
            "dropped": cut.dropped,
        }
        for cut in cuts
    ]


def of_cuts(cuts: Iterable[CutPrompt]) -> list[str]:
    """Warn of prompts that Llama cuts; that CLIP cuts at 77 tokens is normal."""
    return [
        f"{cut['key']} is cut: the text encoder takes {cut['taken']} of its {cut['tokens']} tokens, and what "
        f"begins with {cut['dropped']!r} has no effect: shorten it"
        for cut in cuts
        if cut["encoder"] == "llama"
    ]


def of_loras(settings: Mapping[str, Any]) -> list[str]:
    """Warn of LoRAs some of whose keys match nothing."""
    return [
        f"LoRA {entry['file']}: {entry['unmatched']} of its keys belong nowhere and have no effect"
        for entry in settings.get("loras") or ()
        if entry.get("unmatched")
    ]


def of_crf(settings: Mapping[str, Any]) -> list[str]:
    """Warn if a video is to be lossless.

    For crf 0 x264 uses the profile High 4:4:4 Predictive, which hardware decoders do not know. For crf 1 it
    uses High; measured on a grainy video, no pixel was off by more than 6 of 255 (56 dB).
    """
    if settings.get("crf") != 0:
        return []
    return [
        "crf = 0 is lossless, which phones, Firefox and QuickTime do not play: crf = 1 looks the same and is "
        "played everywhere"
    ]
