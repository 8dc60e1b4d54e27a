"""The job store on a real SQLite file: transitions, claims, crashes, and files that are not ours."""

import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from framepackd.jobs.database import SCHEMA_VERSION, StoreError, open_database
from framepackd.jobs.job import ENDED, Job, State, utc_now
from framepackd.jobs.store import STALLED_DEATHS, JobStore
from tests.daemon.place import undelivered


def job(number: int = 0) -> Job:
    return Job(
        id=f"job-{number}",
        name=f"cat{number}",
        folder="",
        state=State.QUEUED,
        created_at=utc_now(),
        sections=2,
        steps_total=50,
    )


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "framepackd.db")


def test_every_commit_is_durable_and_readers_do_not_wait(store: JobStore) -> None:
    with open_database(store.path).connect() as connection:
        for pragma, expected in (("synchronous", 2), ("journal_mode", "wal"), ("busy_timeout", 5000)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == expected


def test_a_job_is_claimed_once_however_many_ask(store: JobStore) -> None:
    """Left to its defaults, sqlite3 let several threads claim the same job."""
    for number in range(20):
        store.add(job(number))
    claimed: list[str] = []

    def claim_all() -> None:
        while (found := store.claim()) is not None:
            claimed.append(found.id)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(f"job-{number}" for number in range(20))


def test_steps_reported_together_are_recorded_at_the_end_or_before_the_next_change(store: JobStore) -> None:
    for number in range(2):
        store.add(job(number))
        store.claim()
    before = store.changes
    with store.together():
        store.step("job-0", section=1, step=1, seconds=9.0)
        store.step("job-0", section=1, step=2, seconds=1.0)
        store.step("job-1", section=1, step=1, seconds=2.0)
        assert store.get("job-0").step == 0, "they wait for each other"
    assert store.changes == before + 1
    found = store.get("job-0"), store.get("job-1")
    assert [(each.step, each.steps_run, each.step_seconds) for each in found] == [(2, 2, 1.0), (1, 1, 2.0)]
    with store.together():
        store.step("job-0", section=1, step=3, seconds=1.0)
        store.decide("job-0", State.DONE)
        assert store.get("job-0").step == 3, "no decision is durable before what led to it"


def test_steps_that_cannot_be_recorded_are_recorded_once_with_the_next_change(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(job())
    store.claim()
    with sqlite3.connect(store.path) as other, monkeypatch.context() as patched:
        patched.setattr("framepackd.jobs.database.BUSY_MILLISECONDS", 10)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another program holds it"), store.together():
            store.step("job-0", section=1, step=1, seconds=1.0)
        other.rollback()
    store.note("job-0", "goes on")
    store.note("job-0", "goes on")
    found = store.get("job-0")
    assert (found.step, found.steps_run) == (1, 1)


def test_steps_that_wait_are_of_their_thread_alone(store: JobStore) -> None:
    store.add(job())
    store.claim()
    with store.together():
        store.step("job-0", section=1, step=1, seconds=1.0)
        other = threading.Thread(target=store.note, args=("job-0", "of another thread"))
        other.start()
        other.join()
        assert store.get("job-0").steps_run == 0
    assert store.get("job-0").steps_run == 1


def test_jobs_are_claimed_in_the_order_they_came(store: JobStore) -> None:
    for number in range(3):
        store.add(job(number))
    assert [claimed.id for _ in range(3) if (claimed := store.claim())] == ["job-0", "job-1", "job-2"]


def test_a_chosen_job_is_claimed_only_while_it_can_run(store: JobStore) -> None:
    for number in range(3):
        store.add(job(number))
    chosen = store.next_queued(passed_over=["job-0"])
    assert chosen is not None
    store.move_to_front("job-2")
    claimed = store.claim(chosen.id)
    assert claimed is not None
    assert (claimed.id, claimed.state) == ("job-1", State.RUNNING)
    assert store.claim("job-1") is None, "it runs"
    store.decide("job-0", State.CANCELLED)
    assert store.claim("job-0") is None
    assert [job_id for job_id, _ in store.queued_inputs()] == ["job-2"]
    assert store.next_queued(passed_over=["job-2"]) is None


def test_a_note_changes_only_the_history(store: JobStore) -> None:
    store.add(job())
    store.claim()
    before = store.get("job-0").record()
    store.note("job-0", "its checkpoint is kept")
    after = store.get("job-0").record()
    assert after.pop("history")[:-1] == before.pop("history")
    assert after == before
    assert store.get("job-0").history[-1]["note"] == "its checkpoint is kept"


def test_steps_are_counted_over_all_attempts(store: JobStore) -> None:
    store.add(job())
    for attempt in range(3):
        assert store.claim() is not None
        for step in range(1, 4):
            store.step("job-0", section=1, step=step, seconds=1.0)
        if attempt < 2:
            store.requeue("job-0", "stopped")
    found = store.get("job-0")
    assert (found.steps_run, found.step, found.resumes, found.attempts) == (9, 3, 2, 0)
    assert [entry["state"] for entry in found.history] == ["queued", *["running", "queued"] * 2, "running"]


def test_a_daemons_death_is_no_attempt_but_five_without_a_step_move_the_job_to_the_back(
    store: JobStore,
) -> None:
    store.add(job(0))
    store.add(job(1))
    for death in range(STALLED_DEATHS):
        claimed = store.claim()
        assert claimed is not None
        assert claimed.id == "job-0", f"still first after {death} deaths"
        store.recover()
    assert store.get("job-0").attempts == 0
    claimed = store.claim()
    assert claimed is not None
    assert claimed.id == "job-1"


def test_a_finished_step_forgets_earlier_deaths(store: JobStore) -> None:
    store.add(job())
    for _ in range(2 * STALLED_DEATHS):
        assert store.claim() is not None
        store.step("job-0", section=1, step=1, seconds=1.0)
        store.recover()
    assert store.get("job-0").stalled_deaths == 1


def test_what_is_decided_is_not_started_again(store: JobStore) -> None:
    store.add(job())
    store.decide("job-0", State.FAILED, error="no")
    assert store.claim() is None
    assert [found.id for found in undelivered(store)] == ["job-0"]


def test_an_ended_job_stays_as_it_ended(store: JobStore) -> None:
    store.add(job())
    store.finish("job-0", State.DONE, error=None, output="cat.mp4")
    with pytest.raises(StoreError, match="has ended already"):
        store.requeue("job-0", "what for")
    store.decide("job-0", State.FAILED, error="late")
    assert undelivered(store) == []
    assert store.get("job-0").state == State.DONE


def test_a_file_that_is_not_a_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "framepackd.db"
    path.write_bytes(b"this is not SQLite" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        JobStore(path)
    assert path.read_bytes() == b"this is not SQLite" * 100


def test_another_programs_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "framepackd.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE precious (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is not framepackd's database"):
        JobStore(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "framepackd.db"
    JobStore(path)
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    newer.close()
    with pytest.raises(StoreError, match="newer framepackd"):
        JobStore(path)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        JobStore(tmp_path / "framepackd.db", read_only=True)
    assert not (tmp_path / "framepackd.db").exists()


def test_odd_characters_in_the_path_are_no_trouble(tmp_path: Path) -> None:
    folder = tmp_path / "50% of #1? ü"
    folder.mkdir()
    JobStore(folder / "framepackd.db").add(job())
    assert JobStore(folder / "framepackd.db", read_only=True).counts()["queued"] == 1


class Queue(RuleBasedStateMachine):
    """Whatever happens in whatever order: no job is lost, one runs at most, ended ones stay ended."""

    @initialize(folder=st.builds(lambda: Path(__import__("tempfile").mkdtemp())))
    def open(self, folder: Path) -> None:
        self.store = JobStore(folder / "framepackd.db")
        self.added = 0
        self.ended: dict[str, str] = {}
        self.running: str | None = None

    @rule()
    def add(self) -> None:
        self.store.add(job(self.added))
        self.added += 1

    @rule()
    def claim(self) -> None:
        if self.running is None:
            claimed = self.store.claim()
            self.running = claimed.id if claimed else None

    @rule()
    def step(self) -> None:
        if self.running:
            self.store.step(self.running, section=1, step=1, seconds=0.1)

    @rule(fails=st.booleans())
    def worker_ends(self, fails: bool) -> None:
        if self.running:
            if fails:
                self.store.count_attempt(self.running, "ended", max_attempts=100)
            else:
                self.store.requeue(self.running, "ended")
            self.running = None

    @rule()
    def daemon_dies(self) -> None:
        self.store = JobStore(self.store.path)
        self.store.recover()
        self.running = None

    @rule(state=st.sampled_from(ENDED))
    def end(self, state: State) -> None:
        if self.running:
            self.store.decide(self.running, state)
            self.store.finish(self.running, state, error=None, output=None)
            self.ended[self.running] = state
            self.running = None

    @invariant()
    def nothing_is_lost(self) -> None:
        states = self.store.states()
        assert len(states) == self.added
        assert {name: state for name, state in states.items() if state in ENDED} == self.ended
        assert [name for name, state in states.items() if state == "running"] == [self.running][
            : bool(self.running)
        ]


Queue.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
test_no_job_is_ever_lost = Queue.TestCase
