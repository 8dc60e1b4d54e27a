"""Holds back a job whose checkpoint was made on the other type of device, CPU or GPU.

With another card of the same type the job begins anew by itself.
"""

from collections.abc import Mapping
from typing import Any, Literal

Type = Literal["cpu", "cuda"]


class OtherDeviceError(Exception):
    """A checkpoint was made on the other type of device; nothing was changed. The text says what to do."""

    def __init__(self, made_on: str, here: str, what: str) -> None:
        """Say ``what`` was made on which device, by its name, and which one this is."""
        super().__init__(
            f"{what} made on {_words(made_on)}, and {_words(here)} cannot resume them: "
            f"bring {_words(made_on)} back, or set device under [gpu] to it, and restart; or begin anew with "
            "framepackd retry JOB --anew, which sets aside what was made"
        )
        self.made_on: Type = type_of(made_on)


def type_of(device: str) -> Type:
    """Give the type of a device by its name, or by that of its card."""
    return "cpu" if device == "cpu" else "cuda"


def refuse(made_by: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """Compare the identities of a checkpoint and of a job, which name the device they compute on.

    Raises:
        OtherDeviceError: they are of different types.
    """
    before, now = made_by.get("device"), here.get("device")
    if before is not None and now is not None and type_of(before) != type_of(now):
        raise OtherDeviceError(before, now, what)


def _words(device: str) -> str:
    return "the CPU" if device == "cpu" else device
