"""Reads ``NAME_frame_diff.txt``: how much a job's pictures differ, which is only recorded."""

import logging
from pathlib import Path

from framepack_core.errors import RequestError
from framepackd.settings.decoding import as_text

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 13
LEAST, MOST = -1e-6, 2.0  # 1 - SSIM, which rounding may take below 0


def read_differences(path: Path) -> list[float]:
    """Read the difference, or those of the pairs of a chain; none if it is anything else.

    It decides nothing about the video: what is wrong there is told in the log, and spoils no job.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        values = [float(word) for word in as_text(content, path.name).split()]
    except RequestError as error:
        log.warning("%s; no difference is recorded", error)
        return []
    except ValueError:
        values = []
    if not values or len(content) > MAX_BYTES or not all(LEAST <= value <= MOST for value in values):
        log.warning("%s holds no difference (a number from 0 to 2, for a chain one a pair)", path.name)
        return []
    return values
