"""Gives the reason why files wait a code, for who shows it with something to do about it."""

import re

OF_A_CHAIN = re.compile(r"_frame_[0-9]+\.\w+")


def reason_of(name: str, missing: str) -> str:
    """Give the code of what is missing from a group, or in its way.

    >>> reason_of("wren", "wren.txt"), reason_of("walk", "walk_frame_2.png"), reason_of("moon", "moon.png")
    ('no_prompt', 'gap', 'no_picture')
    >>> reason_of("cup", "only one of cup.jpg and cup.png may stay")
    'several'
    """
    if missing == f"{name}.txt":
        return "no_prompt"
    if missing.startswith(name) and OF_A_CHAIN.match(missing.removeprefix(name)):
        return "gap"
    if missing.startswith((f"{name}.png", f"{name}.mp4")):
        return "no_picture"
    return "several" if missing.startswith("only one of ") else "other"
