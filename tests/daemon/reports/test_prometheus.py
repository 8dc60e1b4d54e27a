"""The file for Prometheus, read by Prometheus' own parser; nothing that happens to it stops a job."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framepackd.control.status import snapshot
from framepackd.jobs.database import StoreError, StoreUnavailableError
from framepackd.jobs.job import State
from framepackd.jobs.store import JobStore
from framepackd.reports import prometheus
from framepackd.reports.prometheus import Metrics
from framepackd.settings.config import ConfigError, load_config
from tests.daemon.loop import Loop
from tests.daemon.reports.figures import Figures, figures
from tests.daemon.reports.queue import Queue


class Place:
    """A job store, and metrics of it."""

    def __init__(self, folder: Path) -> None:
        self.jobs = Queue(folder / "state")
        self.file = folder / "framepackd.prom"
        self.config = SimpleNamespace(
            metrics_file=self.file, folders={"outbox": folder}, state_dir=folder / "state"
        )
        self.paused: str | None = None
        config: Any = self.config
        self.metrics = Metrics(config, self.jobs.store, lambda: self.look())

    def look(self) -> dict[str, Any]:
        daemon = {"since": "2026-01-01T00:00:00Z", "paused": self.paused}
        return snapshot(self.jobs.store, (), daemon)

    def figures(self) -> Figures:
        self.metrics.round()
        return figures(self.file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(prometheus, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(prometheus, "LOOK_SHARE", math.inf)
    return Place(tmp_path)


def test_it_shows_the_queue_the_running_job_and_the_work_done(place: Place) -> None:
    for name in ("cat", "dog", "owl", "cow"):
        place.jobs.add(name)
    place.jobs.end("cat")
    place.jobs.end("dog", State.FAILED, error="broken")
    job = place.jobs.store.claim()
    assert job is not None
    place.jobs.store.decide(job.id, State.DONE, timings={"sample": 2.5})
    now = place.figures()
    jobs = {state: now["jobs", state] for state in ("waiting", *State)}
    assert {state: count for state, count in jobs.items() if count} == {
        **{"done": 1, "failed": 1, "running": 1, "queued": 1}
    }
    assert now[("failures_total",)] == 1
    assert now["spent_seconds", "sample"] == 2.5
    assert now["last_finished_time_seconds", "done"] == pytest.approx(time.time(), abs=60)
    assert now["disk_free_bytes", "outbox"] > 0
    assert now[("start_time_seconds",)] == 1767225600
    assert (now[("up",)], now[("paused",)]) == (1, 0)
    place.paused = "by framepackd pause"
    assert place.figures()[("paused",)] == 1
    place.metrics.round(ending=True)
    assert figures(place.file)[("up",)] == 0


ACTS: dict[str, Callable[[JobStore, str], object]] = {
    "claim": lambda store, _: store.claim(),
    "step": lambda store, job: store.step(job, section=1, step=1, seconds=0.5),
    "crash": lambda store, job: store.recover(),
    "fail": lambda store, job: store.finish(job, State.FAILED, error='"\\\n', output=None),
    "cancel": lambda store, job: store.cancel(job, "discard"),
    "retry": lambda store, job: store.retry(job),
}


@settings(max_examples=25, deadline=None)
@given(acts=st.lists(st.tuples(st.sampled_from(sorted(ACTS)), st.integers(0, 2)), max_size=12))
def test_whatever_happens_to_jobs_it_can_be_read_and_its_counters_only_grow(
    acts: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prometheus, "LOOK_SECONDS", 0.0)
        patch.setattr(prometheus, "WRITE_SECONDS", 0.0)
        (odd := Path(folder, 'odd "\\\n{}')).mkdir()
        place = Place(odd)
        ids = [place.jobs.add(name) for name in ("a", "b", "c")]
        before = place.figures()
        for act, number in acts:
            with suppress(StoreError):  # it has ended already
                ACTS[act](place.jobs.store, ids[number])
            now = place.figures()
            assert sum(now["jobs", state] for state in State) == len(ids)
            for counter in ("failures_total", "steps_run_total"):
                assert now[(counter,)] >= before[(counter,)]
            before = now


def test_it_is_replaced_whole_and_others_may_read_it(place: Place) -> None:
    place.metrics.round()
    first = place.file.open()  # as an exporter that reads just then
    place.jobs.add("cat")
    umask = os.umask(0o077)
    try:
        assert place.figures()["jobs", "queued"] == 1
    finally:
        os.umask(umask)
    with first:
        assert 'framepackd_jobs{state="queued",' in first.read()
    assert place.file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in place.file.parent.iterdir() if path.is_file()] == [place.file.name]


def test_it_is_written_again_when_something_has_changed_or_it_has_got_old(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: clock[0])
    place.metrics.round()
    written = place.file.stat().st_ino
    place.metrics.round()
    assert place.file.stat().st_ino == written
    assert 0 < place.metrics.patience <= prometheus.WRITE_SECONDS
    clock[0] += prometheus.WRITE_SECONDS
    place.metrics.round()
    assert place.file.stat().st_ino != written
    monkeypatch.setattr(prometheus, "LOOK_SECONDS", 1.0)
    place.metrics.round()
    place.jobs.add("cat")
    place.metrics.round()
    assert 0 < place.metrics.patience <= 1, "what happened since the last look is told soon"


def test_a_file_that_the_configuration_no_longer_names_goes(place: Place, tmp_path: Path) -> None:
    place.metrics.round()
    other = tmp_path / "other.prom"
    place.config.metrics_file = other
    place.metrics.round()
    assert not place.file.exists()
    assert figures(other)[("up",)] == 1
    place.config.metrics_file = None
    place.metrics.round()
    assert not other.exists()


@pytest.mark.parametrize("lies_there", ["nothing", "a file", "a folder in its place"])
def test_where_it_cannot_be_written_jobs_run_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lies_there: str
) -> None:
    monkeypatch.setattr(prometheus, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(prometheus, "WRITE_SECONDS", 0.0)
    loop = Loop(tmp_path / "place", monkeypatch)
    file = tmp_path / "figures/framepackd.prom"
    if lies_there == "a file":
        file.parent.write_text("")
    elif lies_there != "nothing":
        file.mkdir(parents=True)
    loop.daemon.reconfigure(loop.place.config.model_copy(update={"metrics_file": file}))
    loop.start_job()
    loop.round()
    assert loop.counts() == {"running": 1}
    said = [record.getMessage() for record in caplog.records if "metrics_file" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"metrics_file {file} cannot be written, and is tried again: ")
    if lies_there == "a file":
        file.parent.unlink()
    elif lies_there != "nothing":
        file.rmdir()
    file.parent.mkdir(exist_ok=True)
    loop.round()
    assert figures(file, tmp_path / "place/state")["jobs", "running"] == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_database_that_cannot_be_read_just_now_is_the_daemons_to_tell(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> dict[str, Any]:
        raise StoreUnavailableError("the disk is away")

    monkeypatch.setattr(place, "look", away)
    place.metrics.round()
    assert not caplog.records
    assert not place.file.exists()


def test_in_the_inbox_it_would_be_taken_for_a_job(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('state_dir = "state"\ninbox = "in"\nmetrics_file = "in/framepackd.prom"\n')
    with pytest.raises(ConfigError, match=r"metrics_file .* lies in the inbox"):
        load_config(config)
