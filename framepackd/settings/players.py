"""Warns of settings whose videos common players do not play."""

from collections.abc import Mapping
from typing import Any


def of_crf(settings: Mapping[str, Any]) -> list[str]:
    """Say in words that a lossless video is not played everywhere, if it is to be one.

    x264 makes it in the profile High 4:4:4 Predictive, which decoders in hardware do not know. The profile of
    crf 1 is High, and no pixel was off by more than 6 of 255 (56 dB), with grain.
    """
    if settings.get("crf") != 0:
        return []
    return [
        "crf = 0 is lossless, which phones, Firefox and QuickTime do not play: crf = 1 looks the same and is "
        "played everywhere"
    ]
