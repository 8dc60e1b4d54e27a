"""Passes over jobs that cannot run just now, and says what a person can do about them."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.supervisor import readiness
from framepackd.worker.other_device import can_resume

log = logging.getLogger(__name__)

FOLDERS_SECONDS = 10.0  # before the missing files of passed over jobs are looked for again

_Asked = tuple[frozenset[str], frozenset[str] | None, int]  # passed over, models if not all will do, place


class PassedOver:
    """Chooses the next job of each device, and knows which were passed over and why."""

    def __init__(self, store: JobStore, move_after: timedelta | None = None) -> None:
        """Pass nothing over yet.

        ``move_after``: how long a job waits for the card that it began on; None for ever.
        """
        self._store = store
        self._move_after = math.inf if move_after is None else move_after.total_seconds()
        self._waits_since: dict[str, float] = {}  # by id, on the monotonic clock
        self._began_on: dict[str, str] = {}  # by id: the card that computed it last
        self._cards: dict[object, str] = {}  # of the devices, as far as their workers have reported them
        self._away: dict[object, str] = {}  # devices that compute nothing now, and their names
        self._models: dict[object, frozenset[str]] = {}  # of devices of other machines: those that are there
        self._without_files: dict[str, str] = {}  # by id: what to do
        self._of_other_device: dict[str, tuple[str, str]] = {}  # what to do, and the card they began on
        self._folders_again = 0.0
        self._none_at: dict[_Asked, int] = {}  # what was asked in vain, at which change

    def next_job(self, config: Config, device: object = None, place: int = 0) -> Job | None:
        """Give the job that runs next on a device: the first in the queue that can.

        Args:
            config: the configuration.
            device: who asks, as in :meth:`device_found`; None asks for what any of them can run.
            place: give not the first but the one so many behind it.
        """
        if time.monotonic() >= self._folders_again:
            self._look_for_files(config)
        job = self._next_queued(device, place)
        if job is not None and not readiness.has_files(job.id, job.inputs, config):
            self._look_for_files(config)
            job = self._next_queued(device, place)
        return job

    def _next_queued(self, device: object, place: int) -> Job | None:
        """Ask the store; not again, until it changes, for what it did not find for another device."""
        models = self._models.get(device)
        asked = frozenset(self._reasons_on(device)), models, place
        changes = self._store.changes  # before the query: a job may come meanwhile
        if self._none_at.get(asked) == changes:
            return None
        job = self._store.next_queued(asked[0], place, models)
        if job is None:
            now = {each: at for each, at in self._none_at.items() if at == changes}
            self._none_at = now | {asked: changes}
        return job

    def lacking(self, device: object) -> str | None:
        """Name the model of the first job that would run on a device if that model were there."""
        models = self._models.get(device)
        job = None if models is None else self._store.next_queued(self._reasons_on(device))
        model = None if job is None else str(job.settings.get("model"))
        return None if models is None or model in models else model

    def next_ids(self, devices: Sequence[object]) -> list[str | None]:
        """Give the id of the job that each device gets next, if they become free in this order.

        Unlike :meth:`next_job` it does not look for files, and takes one query for all of a kind.
        """
        found: dict[frozenset[str], list[str]] = {}
        given: list[str | None] = []
        for place, device in enumerate(devices):
            passed_over = frozenset(self._reasons_on(device))
            if passed_over not in found:
                found[passed_over] = self._store.queued_ids(passed_over, len(devices))
            given.append(next(iter(found[passed_over][place:]), None))
        return given

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why each passed over job, by id, cannot run on any device, and what to do."""
        return self._reasons_on(None)

    def _reasons_on(self, device: object) -> Mapping[str, str]:
        """Why each passed over job cannot run on a device; on None of them."""
        return self._elsewhere_begun(device) | self._without_files

    def _elsewhere_begun(self, device: object) -> dict[str, str]:
        asking = [device] if device in self._cards else []
        if device is None:
            asking = [each for each in self._cards if each not in self._away]
        return {
            job: reason + self._named_away(made_on)
            for job, (reason, made_on) in self._of_other_device.items()
            if asking
            and not self.moves(job)
            and not any(can_resume(self._cards[each], made_on, self.elsewhere(each)) for each in asking)
        }

    def _named_away(self, card: str) -> str:
        """Say which devices with this card cannot be reached now."""
        names = [name for device, name in self._away.items() if self._cards.get(device) == card]
        return f" ({', '.join(names)} cannot be reached now)" if names else ""

    def elsewhere(self, device: object) -> frozenset[str]:
        """Give the cards of the other devices, as far as they are known."""
        return frozenset(card for each, card in self._cards.items() if each is not device)

    def wait_for_device(self, job_id: str, reason: str, made_on: str) -> None:
        """Have a job wait for the card that it began on."""
        self._of_other_device[job_id] = reason, made_on
        self._began_on[job_id] = made_on
        self._waits_since.setdefault(job_id, time.monotonic())

    def moves(self, job_id: str) -> bool:
        """Say whether a job has waited long enough for its card, and may begin anew on another."""
        since = self._waits_since.get(job_id)
        return since is not None and time.monotonic() - since >= self._move_after

    def began(self, job_id: str, card: str) -> None:
        """Note that a job runs on a card: it waits for no other any more."""
        self._began_on[job_id] = card
        self.forget(job_id)

    def began_on(self, job_id: str) -> str | None:
        """Give the card that computed a job last; None if that is not known."""
        return self._began_on.get(job_id)

    def card_of(self, device: object) -> str | None:
        """Give the card of a device, as far as it is known."""
        return self._cards.get(device)

    def device_found(self, device: object, card: str) -> None:
        """Note the card of a device."""
        self._cards[device] = card

    def device_has(self, device: object, models: Iterable[str]) -> None:
        """Note which models a device of another machine can load; it gets no other jobs."""
        self._models[device] = frozenset(models)

    def device_away(self, device: object, name: str | None) -> None:
        """Note under which name a device computes nothing now; None: it does again."""
        if name is None:
            self._away.pop(device, None)
        else:
            self._away[device] = name

    def forget(self, job_id: str) -> None:
        """Pass over a job no longer: it was cancelled, or begins anew."""
        self._of_other_device.pop(job_id, None)
        self._waits_since.pop(job_id, None)

    def _look_for_files(self, config: Config) -> None:
        """Find the jobs without their files; log them if there are new ones."""
        before, self._without_files = self._without_files, readiness.without_files(self._store, config)
        self._folders_again = time.monotonic() + FOLDERS_SECONDS if self._without_files else math.inf
        problem = readiness.problem_without_files(self._without_files, config)
        if problem is not None and self._without_files.keys() - before.keys():
            log.warning("%s", problem.text)

    def problems(self, config: Config) -> tuple[Problem, ...]:
        """What a person should put right before all jobs can run."""
        found = (
            readiness.problem_without_files(self._without_files, config),
            readiness.problem_of_other_device(self._elsewhere_begun(None)),
        )
        return tuple(filter(None, found))

    def why(self, config: Config) -> str | None:
        """Say why jobs are passed over, and what to do; None if none are."""
        return "; ".join(problem.text for problem in self.problems(config)) or None
