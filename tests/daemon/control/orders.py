"""Performs commands on a daemon's folders where no daemon runs."""

from pathlib import Path
from typing import Any

from framepackd.control import commands
from framepackd.delivery import deliveries
from framepackd.intake import take_back
from framepackd.jobs.job import Job
from tests.daemon.place import Place, at_every_call, undelivered  # noqa: F401 - across: a fixture


def do(place: Place, command: str, *jobs: str, **more: Any) -> list[tuple[bool, str]]:
    request = {"command": command, "jobs": jobs, **more}
    answer = commands.perform(request, commands.Queue(place.config, place.store))
    return [(result["done"], result["message"]) for result in answer["results"]]


def settle(place: Place) -> None:
    for job in undelivered(place.store):
        deliveries.settle(job, place.config, place.store, take_back.bring_back)


def failed_place(root: Path, text: str = "pan left", settings: str = "") -> Place:
    """Bring a job to the failed folder: because of its settings, if given, else after it ran."""
    place = Place(root)
    place.drop()
    (place.config.inbox / "cat.txt").write_text(text)
    if settings:
        (place.config.inbox / "cat.toml").write_text(settings)
    place.take()
    job = place.store.claim()
    if job is not None:
        place.store.step(job.id, section=1, step=1, seconds=1.0)
        place.store.count_attempt(job.id, "the worker was killed", max_attempts=1)
    settle(place)
    assert place.store.counts()["failed"] == 1
    return place


def only_job(place: Place) -> Job:
    (job,) = (place.store.get(job_id) for job_id in place.store.states())
    return job
