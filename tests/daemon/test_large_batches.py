"""Thousands of files and jobs: what they cost is counted, in looks and questions, and grows as they do."""

import os
import re
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from sqlalchemy import Engine, event

from framepackd import files
from framepackd.cli import main
from framepackd.control import client, socket, status
from framepackd.delivery import target_names
from framepackd.inbox import naming
from framepackd.inbox.scan import Inbox, Name
from framepackd.intake import take as intake
from framepackd.intake import take_back
from framepackd.intake.rounds import Looked, Rounds
from framepackd.intake.scanning import Scanning
from framepackd.jobs import lock as control_lock
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore
from framepackd.reports import prometheus, systemd
from framepackd.settings.config import Config, load_config
from tests.daemon.loop import Loop
from tests.daemon.place import Place

# Through an index that holds no more than is asked for, or from which all is answered.
SHORT_SCANS = ("SCAN job USING INDEX ix_job_undelivered", "SCAN job USING COVERING INDEX ix_job_queue")


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch)


def add(store: JobStore, name: str, state: State = State.QUEUED, folder: str = "", **columns: Any) -> Job:
    job = Job(id=f"id-{folder}-{name}", name=name, folder=folder, state=state, created_at=utc_now())
    for column, value in columns.items():
        setattr(job, column, value)
    return store.add(job)


def plans(store: JobStore, do: Callable[[], object]) -> dict[str, list[str]]:
    """Give how SQLite goes about each question that is asked meanwhile."""
    asked: dict[str, Any] = {}

    def note(connection: object, cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH", "UPDATE")):
            asked[statement] = parameters

    event.listen(Engine, "before_cursor_execute", note)
    do()
    event.remove(Engine, "before_cursor_execute", note)
    with closing(sqlite3.connect(store.path)) as connection:
        return {
            statement: [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            for statement, parameters in asked.items()
        }


def read_through(store: JobStore, do: Callable[[], object]) -> list[str]:
    """Name the questions that are answered by reading or sorting all jobs there are."""
    return [
        f"{statement}: {step}"
        for statement, steps in plans(store, do).items()
        for step in steps
        if (re.match("SCAN job", step) and step not in SHORT_SCANS)
        or ("USE TEMP B-TREE" in step and "LIMIT" in statement)
    ]


def test_no_round_and_no_status_reads_all_jobs_that_have_ended(loop: Loop) -> None:
    """With 20,000 of them a round took 21 ms, twenty times a second."""
    for number in range(3):
        add(loop.place.store, f"done{number}", State.DONE, finished_at=utc_now())
        # Its files are gone: it is passed over.
        add(loop.place.store, f"lost{number}", inputs={"image": {"file": "lost.png"}})
    loop.round()  # a start compares all with what lies in the work folders
    assert loop.counts() == {"done": 3, "queued": 3}
    assert read_through(loop.place.store, loop.round) == []
    assert read_through(loop.place.store, loop.daemon.snapshot) == []


def test_no_job_is_looked_for_by_reading_all_of_them(loop: Loop) -> None:
    store = loop.place.store
    add(store, "cat", folder="sub")
    for wanted in ("id-sub-cat", "cat", "id-sub", "sub/cat", "none"):
        assert read_through(store, lambda wanted=wanted: store.matching(wanted)) == []
    assert read_through(store, lambda: store.taken_as([("sub", "cat")])) == []


def test_the_latest_job_of_a_name_or_of_its_variations_is_the_one_that_was_missed(loop: Loop) -> None:
    store = loop.place.store
    jobs = {
        name: add(store, name, State.DONE, folder)
        for folder, name in (
            *(("", "cat"), ("", "cat_seed_1"), ("", "cat_seed_2"), ("sub", "cat"), ("", "Cat_seed_3")),
            *(("", "cats"), ("", "a%_seed_1"), ("", "ab_seed_1"), ("", "cafe\u0301"), ("", "wolf_seed_1")),
        )
    }
    later = add(store, "wolf", State.FAILED)
    asked = [
        ("", "cat"),
        ("sub", "cat"),
        ("", "a%"),
        ("", "cafe\u0301"),
        ("", "ca"),
        ("x", "cat"),
        ("", "wolf"),
    ]
    assert store.taken_as(asked) == {
        ("", "cat"): jobs["cat_seed_2"].id,
        ("sub", "cat"): jobs["cat"].id,
        ("", "a%"): jobs["a%_seed_1"].id,
        ("", "cafe\u0301"): jobs["cafe\u0301"].id,
        ("", "wolf"): later.id,
    }


def test_jobs_that_texts_have_missed_are_asked_for_once_for_all_of_them(tmp_path: Path) -> None:
    """20,000 captions without pictures, over 5,000 jobs, took three minutes to look at."""
    for number in range(50):
        (tmp_path / f"cat{number}.txt").write_text("a lake")
    asked: list[Collection[Name]] = []

    def taken(names: Collection[Name]) -> dict[Name, str]:
        asked.append(names)
        return {("", "cat7"): "job-7"}

    waiting = {entry.name: entry.missing for entry in Inbox(tmp_path, 0).scan(taken).waiting}
    assert [len(names) for names in asked] == [50]
    assert waiting["cat7"] == "cat7.png (job job-7 was taken before this came)"
    assert waiting["cat8"] == "cat8.png"


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, do: Callable[[], object]) -> int:
    calls = 0
    call = getattr(module, name)

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, counting)
        do()
    return calls


def test_twice_as_many_folders_with_defaults_are_twice_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_at(folders: int) -> int:
        for number in range(folders):
            (tmp_path / f"{number}").mkdir(exist_ok=True)
            for name in ("_defaults.toml", "cat.png", "cat.txt"):
                (tmp_path / f"{number}" / name).write_text("steps = 5")
        return counted(monkeypatch, naming, "is_defaults", Inbox(tmp_path, 0).scan)

    few = look_at(20)
    assert look_at(40) <= 2 * few


def test_twice_as_many_jobs_without_their_keyframes_are_twice_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_at(jobs: int) -> int:
        for number in range(jobs):
            for suffix in (".png", ".txt"):
                (tmp_path / f"{number}{suffix}").write_text("x")
            (tmp_path / f"{number}.toml").write_text(f'keyframes = {{ "0" = "pose{number}.png" }}')
        inbox = Inbox(tmp_path, 0)
        work = counted(monkeypatch, unicodedata, "normalize", inbox.scan)
        assert [entry.missing for entry in inbox.scan().waiting if entry.name == "7"] == ["pose7.png"]
        return work

    few = look_at(20)
    assert look_at(40) <= 2 * few


class Dropped:
    """An inbox with jobs that are ready, of which others hear when the first is taken."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, names: Collection[str]) -> None:
        self.place = Place(root)
        for name in names:
            self.put(f"{name}.png")
            self.put(f"{name}.txt")
        self.rounds = Rounds(self.place.config, self.place.store, lambda: None)
        self.scans = 0
        self.meanwhile: Callable[[], object] = lambda: None
        scan, take = Inbox.scan, intake.take

        def counted(*arguments: Any) -> Any:
            self.scans += 1
            return scan(*arguments)

        def noticed(*arguments: Any) -> Any:
            meanwhile, self.meanwhile = self.meanwhile, lambda: None
            meanwhile()
            return take(*arguments)

        monkeypatch.setattr(Inbox, "scan", counted)
        monkeypatch.setattr(intake, "take", noticed)

    def put(self, name: str, text: str = "a lake") -> None:
        path = self.place.config.inbox / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (32, 32)).save(path)
        else:
            path.write_text(text)

    def look(self) -> Looked:
        return self.rounds.look(self.place.config, lambda: False)

    @property
    def taken(self) -> dict[str, Job]:
        return {job.name: job for job in self.place.store.in_state(State.QUEUED)}


def test_the_inbox_is_not_looked_through_again_for_each_handful_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10,000 pairs each took ten times as long as of 300: the inbox was scanned every half second."""
    monkeypatch.setattr("framepackd.intake.rounds.INTAKE_SECONDS", 0.0)
    monkeypatch.setattr("framepackd.intake.rounds.SCAN_SHARE", 1e-6)
    dropped = Dropped(tmp_path / "place", monkeypatch, [f"cat{number}" for number in range(20)])
    dropped.look()
    assert (dropped.scans, len(dropped.taken)) == (1, 20)


@pytest.mark.parametrize(
    ("name", "came"),
    [
        *(("b", "b.end.png"), ("b", "b_section_0.png"), ("b", "b.toml"), ("b", "_defaults.toml")),
        *(("sub/b", "_defaults.toml"), ("caf\u00e9", "cafe\u0301_end.png")),
    ],
)
def test_what_comes_to_a_job_while_others_are_taken_in_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, came: str
) -> None:
    """Also where it came only after the scan that found the job ready."""
    monkeypatch.setattr("framepackd.intake.rounds.FRESH_SECONDS", -1.0)
    dropped = Dropped(tmp_path / "place", monkeypatch, ["a"])
    dropped.look()
    for each in ("a", name):  # taken in the order in which they came
        dropped.put(f"{each}.png")
        dropped.put(f"{each}.txt")
        time.sleep(0.02)  # the clock of file systems has ticks of up to 10 ms
    dropped.meanwhile = lambda: dropped.put(came, "steps = 7")
    looked = dropped.look()
    alone = name.rpartition("/")[2]
    assert alone not in dropped.taken
    assert not looked.idle
    dropped.look()
    job = dropped.taken[alone]
    assert job.settings["steps"] == 7 or {"end", "keyframe-0"} & job.inputs.keys()


def test_an_end_frame_that_cannot_be_read_and_comes_meanwhile_keeps_its_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = Dropped(tmp_path / "place", monkeypatch, ["a", "b"])
    dropped.meanwhile = lambda: dropped.put("b.end.tiff")
    monkeypatch.setattr("framepackd.intake.rounds.FRESH_SECONDS", -1.0)
    dropped.look()
    assert dropped.taken.keys() == {"a"}
    (waiting,) = {entry.missing for entry in dropped.look().waiting}
    assert "b.end.tiff is not of a known type" in waiting


def test_files_that_belong_to_other_jobs_delay_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framepackd.intake.rounds.FRESH_SECONDS", -1.0)
    dropped = Dropped(tmp_path / "place", monkeypatch, ["a", "b"])

    def come() -> None:
        for name in ("b2.png", "b_c.txt", "bb/b.png", "b.png.part", ".b.end.png"):
            dropped.put(name)

    dropped.meanwhile = come
    dropped.look()
    assert dropped.taken.keys() == {"a", "b"}


def test_of_many_changes_in_the_inbox_the_loop_hears_once(loop: Loop) -> None:
    """What is taken in alone makes thousands; each had the loop go round."""
    heard: list[None] = []
    scanning = Scanning(loop.place.config, loop.place.store, lambda: heard.append(None), lambda: False)
    scanning.changed = False
    for _ in range(100):
        scanning.wake()
    assert len(heard) == 1


def test_a_job_is_delivered_without_listing_all_that_was_delivered_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10,000 results each further one read 40,000 names to find a free one."""
    (tmp_path / "dog.mp4").touch()
    looked_through = counted(
        monkeypatch, os, "scandir", lambda: target_names.free_stem("cat", [".mp4", ".png"], tmp_path)
    )
    assert looked_through == 0
    assert target_names.free_stem("dog", [".mp4", ".png"], tmp_path) == "dog_001"


def test_a_job_that_is_to_run_next_moves_no_other_in_the_queue(loop: Loop) -> None:
    store = loop.place.store
    before = [add(store, name).position for name in ("ant", "bee", "cat")]
    assert store.move_to_front("id--cat")
    assert [store.get(f"id--{name}").position for name in ("ant", "bee")] == before[:2]
    assert [job.name for job in store.in_state(State.QUEUED)] == ["cat", "ant", "bee"]


class Asked:
    """A daemon that does all it is asked to, and remembers it."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.parts: list[int] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.parts.append(len(request["jobs"]))
        self.jobs += request["jobs"]
        return {"results": [{"done": True, "message": f"job {job} is cancelled"} for job in request["jobs"]]}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Asked]:
    """Have it serve on the place of the tests."""
    asked, place = Asked(), Place(tmp_path / "place")
    lock = control_lock.Lock(place.config.state_dir)
    with socket.serve(place.config.state_dir, asked.answer):
        yield asked
    lock.release()


def test_thousands_of_jobs_are_cancelled_in_one_call_and_told_one_by_one(
    serving: Asked, tmp_path: Path
) -> None:
    """They went over the socket in one line, which was cut off at 64 KiB."""
    wanted = [f"20260101-{number:06}-{number:06x}" for number in range(3_000)]
    config = str(tmp_path / "place/config.toml")
    result = CliRunner().invoke(main, ["cancel", "--config", config, *wanted])
    assert result.exit_code == 0, result.output
    assert serving.jobs == wanted
    assert result.output.splitlines() == [f"job {job} is cancelled" for job in wanted]
    assert max(serving.parts) <= client.LARGEST_PART, "the loop hears others between"


def test_a_part_is_as_large_as_the_daemon_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: clock[0])
    sizes: list[int] = []

    def on_a_slow_disk(_: Config, part: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(part["jobs"]))
        clock[0] += 0.25 * sizes[-1]
        return {"results": []}

    monkeypatch.setattr(client, "ask", on_a_slow_disk)
    config = Place(tmp_path / "place").config
    assert len(list(client.change(config, {"command": "cancel", "jobs": list(map(str, range(100)))})))
    assert sizes[:3] == [10, 4, 4]
    assert sum(sizes) == 100


def test_of_many_jobs_the_first_named_runs_first(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    names = [f"cat{number}" for number in range(35)]
    for name in reversed(names):
        add(place.store, name)
    results = [
        each for part in client.change(place.config, {"command": "top", "jobs": names}) for each in part
    ]
    assert all(result["done"] for result in results)
    assert [job.name for job in place.store.in_state(State.QUEUED)] == names


def test_a_request_that_is_too_long_is_refused_in_words(serving: Asked, tmp_path: Path) -> None:
    state_dir = load_config(tmp_path / "place/config.toml").state_dir
    answer = socket.ask(state_dir, {"command": "cancel", "jobs": ["x" * socket.MAX_REQUEST_BYTES]})
    assert answer == {"error": "a request may have 1048576 bytes: ask for fewer jobs at once"}
    assert not serving.parts


class Counted(dict[str, Any]):
    """Settings that count how often they are looked at."""

    looks = 0

    def get(self, *arguments: Any) -> Any:
        Counted.looks += 1
        return super().get(*arguments)


def test_how_long_thousands_of_jobs_take_is_estimated_by_a_look_at_each() -> None:
    """Those that were tried again have a pace of their own, and each was compared with each."""
    jobs = [
        Job(
            id=f"{number}",
            state=State.QUEUED,
            settings=Counted(model="demo"),
            step_seconds=1.0 + number,
            steps_beyond=0,
        )
        for number in range(100)
    ]
    for job in jobs:
        job.width, job.height, job.sections, job.section, job.step, job.steps_total = 64, 64, 1, 0, 0, 10
        job.position, job.stalled_deaths, job.decode_seconds = 0.0, 0, 0.0
    none: Any = lambda _: []  # noqa: E731 - a stand-in
    store: Any = SimpleNamespace(in_state=lambda *_: jobs, last_ended=none, open_failures=none, counts=dict)
    report = status.snapshot(store, (), {"paused": None})
    assert [job["eta_seconds"] for job in report["jobs"]][:3] == [10.0, 20.0, 30.0]
    assert Counted.looks <= 20 * len(jobs)


def test_the_more_there_is_to_say_the_less_often_systemd_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10,000 jobs in the queue the loop spent two thirds of its time on that."""
    clock = [100.0]
    told: list[float] = []

    def say() -> str:
        told.append(clock[0])
        clock[0] += 0.5
        return "all is well"

    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setattr(systemd.time, "monotonic", lambda: clock[0])
    reporter = systemd.Reporter(say)
    while clock[0] < 130:
        reporter.round(stopping=False)
        clock[0] += 0.25
    assert told == [100.0, 110.0, 120.0]


def test_the_more_jobs_there_are_the_less_often_figures_are_looked_for(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    looked: list[float] = []

    def look() -> dict[str, Any]:
        looked.append(clock[0])
        clock[0] += 0.5
        return snapshot

    snapshot = loop.daemon.snapshot()
    config = loop.place.config.model_copy(update={"metrics_file": loop.place.config.state_dir / "figures"})
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: clock[0])
    figures = prometheus.Metrics(config, loop.place.store, look)
    while clock[0] < 130:
        figures.round()
        clock[0] += 0.25
    assert len(looked) == 3


def test_a_retry_looks_for_defaults_above_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that had failed at intake is checked anew: each listed the whole inbox."""
    place = Place(tmp_path / "place")
    for folder in ("a", "a/b", *(f"other{number}" for number in range(20))):
        (place.config.inbox / folder).mkdir()
        (place.config.inbox / folder / "_defaults.TOML").write_text("steps = 5")
    job = Job(id="id", name="cat", folder="a/b")
    found: list[str] = []
    listed = counted(
        monkeypatch, files, "folder_below", lambda: found.extend(take_back.defaults_of(job, place.config))
    )
    assert found == ["a/_defaults.TOML", "a/b/_defaults.TOML"]
    assert listed == 3
    assert take_back.defaults_of(Job(id="id", name="cat", folder="gone"), place.config) == []
