"""What must be there before the next job starts; while it is not, the queue waits, and goes on by itself."""

from framepack_core import models
from framepack_core.errors import FramePackError
from framepackd.config import Config
from framepackd.database import Job
from framepackd.space import shortage


def missing_model(job: Job, config: Config) -> str | None:
    """Say which file of the job's model is missing and how to fetch it; None if all are here."""
    try:
        models.find(config.spec(job.settings["model"]))
    except FramePackError as error:
        return str(error)
    except (KeyError, ValueError, OSError):  # not in the config any more, or damaged: loading it says so
        return None
    return None


def missing_room(job: Job, config: Config) -> str | None:
    """Say where there is too little room on a disk for the job; None if there is enough."""
    try:
        return shortage(job, config)
    except OSError as error:
        return f"{error.filename} cannot be looked at ({error.strerror}): check that its disk is there"
