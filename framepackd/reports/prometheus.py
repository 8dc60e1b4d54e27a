"""Writes metrics to a file for Prometheus' node exporter."""

import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, true

from framepackd.apart import within
from framepackd.files import PART_PREFIX
from framepackd.jobs.database import StoreUnavailableError
from framepackd.jobs.job import ENDED, Job, State
from framepackd.jobs.report import Report, running_in
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config
from framepackd.text import as_utf8

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # at least, between two looks for changes ...
LOOK_SHARE = 0.05  # ... which take at most this share of the loop's time, however many jobs there are
ANSWER_SECONDS = 3.0  # for a disk to report its free space
WRITE_SECONDS = 15.0  # between two writes without a change: the file's age shows whether the daemon lives


class Metrics:
    """Writes the file from the rounds of the daemon's loop; no failure here stops the loop."""

    def __init__(self, config: Config, store: JobStore, look: Callable[[], Report]) -> None:
        """Write nothing yet; ``look`` gives what ``status --json`` prints."""
        self.config = config
        self._store = store
        self._look = look
        self._next_look = self._next_write = 0.0
        self._stale = False  # there was a round since the last look
        self._written: object = None  # the state that the file shows
        self._file: Path | None = None  # the file that was written
        self._trouble: str | None = None

    def round(self, *, ending: bool = False) -> None:
        """Write the file if something has changed or it is old, and when the daemon ends."""
        file = self.config.metrics_file
        if self._file is not None and self._file != file:
            with contextlib.suppress(OSError):  # nobody may take an old file for the present
                self._file.unlink()
            self._file, self._next_look = None, 0.0
        now = time.monotonic()
        self._stale = now < self._next_look and not ending
        if file is None or self._stale:
            return
        try:
            self._write(file, now, ending=ending)
        except StoreUnavailableError:
            self._next_look = now + LOOK_SECONDS  # the daemon says so
        except Exception as error:  # a full disk or whatever: no video waits for metrics
            why = str(error)
            if isinstance(error, OSError):
                why = f"{error.strerror}: make the folder if it is missing, and let this user write there"
            if why != self._trouble:
                log.warning("metrics_file %s cannot be written, and is tried again: %s", file, why)
            self._trouble, self._next_look = why, now + WRITE_SECONDS
        else:
            rest = max(LOOK_SECONDS, (time.monotonic() - now) / LOOK_SHARE)
            self._next_look = now + min(rest, WRITE_SECONDS)
            if self._trouble is not None:
                log.info("metrics_file %s is written again", file)
            self._trouble = None

    @property
    def patience(self) -> float:
        """How many seconds the loop may wait before its next round."""
        if self.config.metrics_file is None:
            return float("inf")
        due = self._next_look if self._stale else max(self._next_look, self._next_write)
        return max(due - time.monotonic(), 0.0)

    def _write(self, file: Path, now: float, *, ending: bool) -> None:
        report = self._look()
        running = running_in(report)
        at = [(job["id"], job["section"]) for job in running]
        going_on = (report["counts"], report["daemon"]["paused"], report["problems"], at)
        if going_on != self._written or now >= self._next_write or file != self._file or ending:
            families = [*self._of_the_daemon(report, up=not ending), *self._of_the_jobs(report)]
            _replace(file, families, str(self.config.state_dir))
            self._written, self._file, self._next_write = going_on, file, now + WRITE_SECONDS

    def _of_the_daemon(self, report: Report, *, up: bool) -> "Iterator[Metric]":
        daemon = report["daemon"]
        yield _gauge("up", "Whether the daemon runs.", up)
        assert daemon["since"] is not None, "it runs"
        since = datetime.fromisoformat(daemon["since"]).timestamp()
        yield _gauge("start_time_seconds", "When the daemon was started, in Unix time.", since)
        held = daemon["paused"] is not None
        yield _gauge("paused", "Whether nothing is started: by a pause, or something is missing.", held)
        problems = Counter(problem["code"] for problem in report["problems"])
        yield _gauge("problems", "What a person should put right; status says it in words.", problems, "code")
        free: dict[str, float] = {}
        for name, folder in self.config.folders.items():
            with contextlib.suppress(OSError):  # its disk is away just now
                room = within(ANSWER_SECONDS, f"room-{name}", partial(shutil.disk_usage, folder), None)
                free |= {} if room is None else {name: room.free}
        yield _gauge("disk_free_bytes", "Free on the disk of a folder.", free, "folder")

    def _of_the_jobs(self, report: Report) -> "Iterator[Metric]":
        yield _gauge("jobs", "Jobs by state; waiting: files that miss a partner.", report["counts"], "state")
        moving = [job["delivery"] for job in report["jobs"] if job["delivery"]]
        stuck = Counter(delivery["reason"] for delivery in moving if delivery["reason"])
        yield _gauge(
            "undelivered_jobs", "Jobs whose files cannot be moved just now, and why.", stuck, "reason"
        )
        tries = [delivery["next_try"] for delivery in moving if delivery["next_try"]]
        if tries:
            at = datetime.fromisoformat(min(tries)).timestamp()
            yield _gauge("delivery_next_try_time_seconds", "When they are tried again, in Unix time.", at)
        yield from totals(self._store)
        if report["eta_seconds"] is not None:
            yield _gauge("queue_eta_seconds", "Until all that is queued is done.", report["eta_seconds"])
        yield from self._of_the_running(report)

    def _of_the_running(self, report: Report) -> "Iterator[Metric]":
        """Tell how far the running job is; with several devices, each one's."""
        devices = report["daemon"].get("devices", [])
        computed = {device["job"] for device in devices}  # not those whose videos are written meanwhile
        jobs = [job for job in running_in(report) if not devices or job["id"] in computed]
        progress = {job["id"]: job["progress"] or 0.0 for job in jobs}
        paces = {job["id"]: job["step_seconds"] for job in jobs if job["step_seconds"] is not None}
        names = [device["name"] for device in devices]
        if len(set(names)) < len(names):  # several workers on the CPU
            names = [f"{name}#{number}" for number, name in enumerate(names, 1)]
        for name, about, values in (
            ("running_progress_ratio", "How much of the running job's steps is done.", progress),
            ("step_seconds", "What a step of the running job takes.", paces),
        ):
            if len(devices) < 2:
                for value in values.values():
                    yield _gauge(name, about, value)
                continue
            found = zip(names, devices, strict=True)
            by_device = {label: values[each["job"]] for label, each in found if each["job"] in values}
            yield _gauge(name, about, by_device, "device")


def totals(store: JobStore) -> "Iterator[Metric]":
    """Sum over all recorded jobs and all their attempts."""
    from prometheus_client.core import CounterMetricFamily

    entry = func.json_each(Job.history).table_valued("value")
    failed = func.json_extract(entry.c.value, "$.state") == State.FAILED
    failing = select(func.count()).select_from(Job).join(entry, true()).where(failed)
    phase = func.json_each(Job.timings).table_valued("key", "value")
    spending = select(phase.c.key, func.sum(phase.c.value)).select_from(Job).join(phase, true())
    last = select(Job.state, func.max(Job.finished_at)).where(Job.state.in_(ENDED)).group_by(Job.state)
    with store.looking() as session:
        steps = session.scalar(select(func.sum(Job.steps_run))) or 0
        failures = session.scalar(failing) or 0
        spent = session.execute(spending.group_by(phase.c.key)).all()
        ends = session.execute(last).all()
    yield CounterMetricFamily("framepackd_steps_run", "Sampling steps, of all attempts.", value=steps)
    yield CounterMetricFamily("framepackd_failures", "Times that a job has failed.", value=failures)
    took = "What the jobs that have ended took, by phase."
    yield _gauge("spent_seconds", took, {row[0]: row[1] for row in spent}, "phase")
    at = {row[0]: datetime.fromisoformat(row[1]).timestamp() for row in ends if row[1] is not None}
    yield _gauge("last_finished_time_seconds", "When a job last ended so, in Unix time.", at, "state")


def _gauge(name: str, what: str, value: "float | Mapping[str, float]", label: str | None = None) -> "Metric":
    """Make a gauge of one value or, with a ``label``, of one for each of its values."""
    from prometheus_client.core import GaugeMetricFamily

    if not isinstance(value, Mapping):
        return GaugeMetricFamily(f"framepackd_{name}", what, value=value)
    family = GaugeMetricFamily(f"framepackd_{name}", what, labels=[str(label)])
    for of, each in value.items():
        family.add_metric([of], each)
    return family


def _replace(file: Path, families: "list[Metric]", state_dir: str) -> None:
    """Write the file whole, readable for everybody: the exporter is another user.

    All is labelled with the state folder: of two daemons an exporter refuses figures that look the same.
    """
    from prometheus_client import generate_latest

    own = {"state_dir": as_utf8(state_dir)}
    for family in families:
        family.samples = [sample._replace(labels={**sample.labels, **own}) for sample in family.samples]
    part = file.with_name(f"{PART_PREFIX}{file.name}.part")
    try:
        registry: Any = SimpleNamespace(collect=lambda: families)  # all of it that is used
        part.write_bytes(generate_latest(registry))
        part.chmod(0o644)
        part.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
