"""Warns of a job that is done all the same: prompts that are cut, LoRAs that fit in part."""

from collections.abc import Iterable, Mapping
from typing import Any

from framepack_core.request import Cut


def recorded(settings: Mapping[str, Any], cuts: Iterable[Cut]) -> list[dict[str, Any]]:
    """Give what is recorded of prompts that are cut, each by its key in the job's settings."""
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


def of_cuts(cuts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say in words which prompts are cut; not by CLIP, whose 77 tokens many a good prompt exceeds."""
    return [
        f"{cut['key']} is cut: the text encoder takes {cut['taken']} of its {cut['tokens']} tokens, and what "
        f"begins with {cut['dropped']!r} has no effect: shorten it"
        for cut in cuts
        if cut["encoder"] == "llama"
    ]


def of_loras(settings: Mapping[str, Any]) -> list[str]:
    """Say in words of which LoRAs keys belong nowhere."""
    return [
        f"LoRA {entry['file']}: {entry['unmatched']} of its keys belong nowhere and have no effect"
        for entry in settings.get("loras") or ()
        if entry.get("unmatched")
    ]
