"""Counts how often in a row a device failed, and says how long to wait before the next try."""

RETRY_SECONDS = 30.0  # before something that kept a job from going on is tried again
_FAULTS = 2  # in a row, in fresh workers: the device is at fault, not the job
_MAX_DOUBLINGS = 4  # of the wait, while a device is missing: a worker takes seconds of CPU time to find out


class DeviceFaults:
    """What keeps jobs from running on one device."""

    def __init__(self) -> None:
        """Begin with none."""
        self._blocked: str | None = None  # why disk or device stopped the last job
        self._in_a_row = 0  # of workers that had not done a step

    def take_block(self) -> str | None:
        """Say why disk or device stopped the last job; None at the second call."""
        reason, self._blocked = self._blocked, None
        return reason

    @property
    def patience(self) -> float:
        """How many seconds to wait before a blocked job is tried again."""
        return RETRY_SECONDS * (1 << min(max(self._in_a_row - _FAULTS, 0), _MAX_DOUBLINGS))

    def block(self, reason: str, *, device: bool) -> None:
        """Note that a job was stopped, by the device or by a disk."""
        self._blocked = reason
        self._in_a_row += device

    def failed(self, error: str) -> None:
        """Note that a worker failed before its first step."""
        self._in_a_row += 1
        if self._in_a_row >= _FAULTS:
            self._blocked = (
                f"the device failed in {self._in_a_row} fresh workers in a row ({error}): look at "
                "nvidia-smi and dmesg, and restart the machine if it persists; the daemon keeps trying"
            )

    def worked(self) -> None:
        """Note that the device has done a step."""
        self._in_a_row = 0
