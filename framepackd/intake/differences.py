"""Reads NAME_frame_diff.txt: how much the pictures of a job differ."""

import logging
from pathlib import Path

from framepack_core.errors import RequestError
from framepackd.settings.decoding import as_text

log = logging.getLogger(__name__)

MAX_DIFFERENCES_BYTES = 1 << 13
LEAST_DIFFERENCE, MOST_DIFFERENCE = -1e-6, 2.0  # 1 - SSIM, which rounding may take below 0


def read_differences(path: Path) -> list[float]:
    """Read how much the pictures differ, for a chain one number a pair; an empty list if it is unusable.

    It decides nothing about the video: what is wrong there goes to the log and spoils no job.
    """
    with path.open("rb") as file:
        content = file.read(MAX_DIFFERENCES_BYTES + 1)
    try:
        values = [float(word) for word in as_text(content, path.name).split()]
    except RequestError as error:
        log.warning("%s; no difference is recorded", error)
        return []
    except ValueError:
        values = []
    usable = all(LEAST_DIFFERENCE <= value <= MOST_DIFFERENCE for value in values)
    if not values or len(content) > MAX_DIFFERENCES_BYTES or not usable:
        log.warning("%s holds no difference (a number from 0 to 2, for a chain one a pair)", path.name)
        return []
    return values
