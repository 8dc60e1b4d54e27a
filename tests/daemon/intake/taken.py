"""Takes a drop with settings and gives its job."""

from pathlib import Path

from framepackd.jobs.job import Job
from tests.daemon.place import Place


def taken(folder: Path, settings: str, model: str = "demo") -> tuple[Place, Job]:
    place = Place(folder)
    place.drop()
    (place.config.inbox / "cat.toml").write_text(f'model = "{model}"\n{settings}')
    place.take()
    (job,) = place.store.matching("cat")
    return place, job
