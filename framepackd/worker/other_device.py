"""Holds back a job whose checkpoint only another device can resume: the other type, or another card here.

With another card of the same type the job begins anew by itself, unless its own card is here too.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

Type = Literal["cpu", "cuda"]


class OtherDeviceError(Exception):
    """A checkpoint was made on another device; nothing was changed. The text says what to do."""

    def __init__(self, made_on: str, here: str, what: str, *, is_here: bool) -> None:
        """Say ``what`` was made on which card, by its name, which one this is, and whether both are here."""
        if is_here:
            then = f"it resumes when {_words(made_on)} is free"
        else:
            then = f"bring {_words(made_on)} back, or set device under [gpu] to it, and restart"
        super().__init__(
            f"{what} made on {_words(made_on)}, and {_words(here)} cannot resume them: {then}; or begin anew "
            "with framepackd retry JOB --anew, which sets aside what was made"
        )
        self.made_on = made_on
        self.here = here


def type_of(device: str) -> Type:
    """Give the type of a device by its name, or by that of its card."""
    return "cpu" if device == "cpu" else "cuda"


def can_resume(card: str, made_on: str, elsewhere: Collection[str]) -> bool:
    """Say whether a job that began on one card may go on, or begin anew, on another.

    ``elsewhere``: the cards of the other devices here.
    """
    if card == made_on:
        return True
    return type_of(card) == type_of(made_on) and made_on not in elsewhere


def refuse(
    made_by: Mapping[str, Any], here: Mapping[str, Any], what: str, elsewhere: Collection[str] = ()
) -> None:
    """Compare the identities of a checkpoint and of a job, which name the device they compute on.

    Raises:
        OtherDeviceError: only another device can resume it.
    """
    before, now = made_by.get("device"), here.get("device")
    if before is not None and now is not None and not can_resume(now, before, elsewhere):
        raise OtherDeviceError(before, now, what, is_here=before in elsewhere)


def _words(device: str) -> str:
    return "the CPU" if device == "cpu" else device
