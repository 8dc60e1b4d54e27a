"""The snapshot: progress, finish times and notes, which terminal, page and metrics show alike."""

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framepackd.control.status import in_one_line, snapshot
from framepackd.inbox.scan import Waiting
from framepackd.jobs.described import described, whole
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.report import DaemonReport, Report
from framepackd.jobs.store import JobStore
from framepackd.reports.prometheus import Metrics
from framepackd.settings.config import Config
from framepackd.text import clock, percent
from framepackd.web import fragments, tonight
from framepackd.web.drop import describe
from framepackd.web.rendering import clock as of_the_night
from framepackd.web.rendering import render
from tests.daemon.control.drawing import drawn

DAEMON: DaemonReport = {
    "state": "running",
    "pid": 1,
    "since": utc_now(),
    "model": "demo",
    "device": "cpu",
    "hardware": None,
    "paused": None,
}
NOTHING: tuple[Waiting, ...] = ()


def on_page(template: str, report: Report) -> str:
    """Draw a part of the page."""
    queued = tonight.queued(report)
    shown = {"night": tonight.night(report), "queued": queued, "queued_count": len(queued), "failed": []}
    shown |= {"waiting": fragments.waiting(report), "path_of": tonight.path_of}
    shown |= {"token": "", "failed_folder": ""}
    return render(template, **shown)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "framepackd.db")


def add(store: JobStore, name: str, *, frames: int = 0, **settings: Any) -> Job:
    settings = {"model": "demo", "latent_window_size": 9, "true_cfg_scale": 1.0} | settings
    job = Job(id=f"id-{name}", name=name, state=State.QUEUED, created_at=utc_now(), settings=settings)
    job.inputs = {f"frame-{number}": {} for number in range(frames)}
    job.width, job.height, job.sections, job.steps_total, job.frames = 128, 128, 4, 100, 145
    return store.add(job)


def test_before_anything_was_measured_no_time_is_promised(store: JobStore) -> None:
    add(store, "cat")
    report = snapshot(store, NOTHING, DAEMON)
    assert report["eta_seconds"] is None
    assert report["jobs"][0]["eta_seconds"] is None


def test_a_job_ends_when_its_steps_and_decodes_are_done_and_the_queue_after_it(store: JobStore) -> None:
    add(store, "cat")
    add(store, "dog", true_cfg_scale=2.0)
    store.claim()
    store.step("id-cat", section=1, step=1, seconds=99.0)  # the first warms up, and does not count
    for step in range(2, 26):
        store.step("id-cat", section=1, step=step, seconds=2.0)
    store.decoded("id-cat", section=1, seconds=10.0)
    for step in range(1, 11):
        store.step("id-cat", section=2, step=step, seconds=2.0)
    report = snapshot(store, NOTHING, DAEMON)
    cat, dog = report["jobs"]
    assert cat["eta_seconds"] == pytest.approx(65 * 2 + 3 * 10, abs=3)
    assert dog["eta_seconds"] == pytest.approx(2 * (100 * 2 + 4 * 10), abs=1), "guidance calls twice a step"
    assert report["eta_seconds"] == pytest.approx(cat["eta_seconds"] + dog["eta_seconds"], abs=0.2)
    shown = drawn(report)
    assert "section 2/4" in shown
    assert "step 10/25" in shown
    assert f"{percent((1 + 20 / (50 + 10)) / 4)} %" in shown, "all sections count alike, and decodes in them"


def test_a_decode_is_shown_and_its_time_counts(store: JobStore) -> None:
    add(store, "cat")
    store.claim()
    for section in range(1, 5):
        for step in range(1, 26):
            store.step("id-cat", section=section, step=step, seconds=1.0)
        if section < 4:
            store.decoded("id-cat", section=section, seconds=60.0)
    report = snapshot(store, NOTHING, DAEMON)
    assert report["jobs"][0]["eta_seconds"] == pytest.approx(60, abs=3)
    assert "section 4/4  decoding" in drawn(report)


def test_the_newest_result_comes_first_and_a_suspect_one_is_marked(store: JobStore) -> None:
    for name in ("cat", "dog"):
        add(store, name)
        store.finish(f"id-{name}", State.DONE, error=None, output=f"/out/{name}.mp4")
    report = snapshot(store, NOTHING, DAEMON)
    assert [job["name"] for job in report["jobs"]] == ["dog", "cat"]
    assert report["counts"]["done"] == 2
    report["jobs"][0]["quality"] = "frozen"
    assert "suspect" in drawn(report)
    assert "frozen: /out/dog.mp4" in drawn(report), "why, and where it is all the same"


def test_in_80_columns_names_are_whole_and_reasons_below_them(store: JobStore) -> None:
    """Each had a narrow column: names were cut after twelve letters, paths after thirty."""
    names = [f"holiday-in-the-mountains-{number}" for number in range(4)]
    for name in names:
        add(store, name)
    output = f"/outbox/of/somebody/who/has/sorted/{names[0]}.mp4"
    store.finish(f"id-{names[0]}", State.DONE, error=None, output=output)
    store.claim()
    store.step(f"id-{names[1]}", section=1, step=25, seconds=1.0)
    unmeasured = drawn(snapshot(store, NOTHING, DAEMON), width=80)
    assert "section 1/4  decoding" in unmeasured, "whole, also where no end is known yet"
    store.decoded(f"id-{names[1]}", section=1, seconds=1.0)
    store.step(f"id-{names[1]}", section=2, step=10, seconds=1.0)
    reason = f"{names[3]}.png is a conflict copy of another one (Nextcloud): delete it, or rename it"
    waiting = (Waiting("", names[3], (f"{names[3]}.png", f"{names[3]}.txt"), reason, utc_now()),)
    report = snapshot(store, waiting, DAEMON)
    lines = [line.rstrip() for line in drawn(report, width=80).splitlines()]
    assert "…" not in "".join(lines)
    assert all(len(line) <= 80 for line in lines)
    assert f"  now        {names[1]}" in lines
    assert any(line.startswith(f"  queue      {names[2]}  145 frames  about") for line in lines)
    assert lines[-1] == f"             {output}"
    assert lines[-2].startswith(f"  done       {names[0]}  ")
    assert len([line for line in lines if "section 2/4  step 10/25" in line]) == 1
    assert reason in " ".join(" ".join(lines).split())


def test_names_cannot_control_the_terminal(store: JobStore) -> None:
    add(store, "evil\x1b[31m\nname [bold]x[/]")
    waiting = (Waiting("", "a\x1b]0;title\x07", ("a\x1b]0;title\x07.png",), "a\x1b[2J.txt", utc_now()),)
    shown = drawn(snapshot(store, waiting, DAEMON))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]x[/]" in shown


def test_each_state_of_the_daemon_has_its_words(store: JobStore) -> None:
    for state, words in (("stopped", "is not running"), ("died", "died and left work behind")):
        assert words in drawn(snapshot(store, NOTHING, DAEMON | {"state": state}))
    assert "nothing to do" in drawn(snapshot(None, NOTHING, DAEMON))


def test_a_queue_that_waits_says_why_and_promises_no_end(store: JobStore) -> None:
    add(store, "cat")
    store.claim()
    for step in range(1, 26):
        store.step("id-cat", section=1, step=step, seconds=2.0)
    store.decoded("id-cat", section=1, seconds=9.0)
    store.requeue("id-cat", "paused")
    store.pause()
    running = snapshot(store, NOTHING, DAEMON)
    assert running["eta_seconds"] is not None
    report = snapshot(store, NOTHING, DAEMON | {"paused": store.paused()})
    assert report["eta_seconds"] is None
    assert "paused     by framepackd pause since 20" in drawn(report)
    assert "framepackd resume goes on" in drawn(report)


def test_a_running_job_that_is_to_be_cancelled_is_marked(store: JobStore) -> None:
    add(store, "cat")
    store.claim()
    store.cancel("id-cat", "discard")
    report = snapshot(store, NOTHING, DAEMON)
    assert report["jobs"][0]["note"] == "is being cancelled"
    assert "is being cancelled" in drawn(report)


def figures_of(report: Report, store: JobStore, folder: Path) -> str:
    """Give the file for Prometheus, without the label that names the daemon."""
    config: Any = SimpleNamespace(metrics_file=folder / "figures", folders={}, state_dir=folder)
    Metrics(config, store, lambda: report).round()
    return re.sub(r',?state_dir="[^"]*"', "", config.metrics_file.read_text()).replace("{}", "")


def test_a_running_chain_reads_the_same_on_terminal_page_metrics_and_in_systemds_line(
    store: JobStore, tmp_path: Path
) -> None:
    """The page knew no chains, and said of its section 3 of 4 what is section 1 of clip 2."""
    job = add(store, "cat", frames=3)
    store.claim()
    assert snapshot(store, NOTHING, DAEMON)["jobs"][0]["stage"] == ["loading the model"]
    for section, steps in ((1, 25), (2, 25), (3, 8)):
        for step in range(1, steps + 1):
            store.step(job.id, section=section, step=step, seconds=90.0)
        if steps == 25:
            store.decoded(job.id, section=section, seconds=1.0)
    report, now = snapshot(store, NOTHING, DAEMON), datetime.now(UTC)
    running = report["jobs"][0]
    assert (running["progress"], running["stage"]) == (0.58, ["clip 2/2", "section 1/2", "step 8/25"])
    assert running["eta_seconds"] is not None
    assert running["finishes_at"] is not None
    then = now + timedelta(seconds=running["eta_seconds"])
    assert abs(datetime.fromisoformat(running["finishes_at"]) - then) < timedelta(seconds=5)
    ends = clock(running["finishes_at"], now)
    assert f"58 %, clip 2/2, section 1/2, step 8/25, done {ends}" in in_one_line(report, now)
    assert tonight.where(running) == "Clip 2/2, section 1/2, step 8/25, 90.0 s a step"
    assert running["ends_at"] == running["finishes_at"]
    assert tonight.night(report).clock == of_the_night(running["ends_at"])
    assert "58 %  clip 2/2  section 1/2  step 8/25  in" in drawn(report)
    assert f", at {ends}" in drawn(report)
    assert "running_progress_ratio 0.58\n" in figures_of(report, store, tmp_path)
    recorded = whole(store.get(job.id), Config(state_dir=tmp_path))
    assert {key: recorded[key] for key in ("progress", "stage", "note")} == {
        key: running.get(key) for key in ("progress", "stage", "note")
    }
    assert describe(recorded) == "running: clip 2/2, section 1/2, step 8/25", "what the API tells a script"
    older: Any = {
        key: value for key, value in running.items() if key not in ("progress", "stage", "finishes_at")
    }
    assert "0 %" in drawn(report | {"jobs": [older]}), "a daemon that still runs after an update"
    (piece,) = tonight.night(fragments.prepared(report | {"jobs": [older]})).pieces
    assert (piece.done, piece.ends) == (0, of_the_night(running["ends_at"]))


def test_two_running_jobs_are_both_on_terminal_page_metrics_and_in_systemds_line(
    store: JobStore, tmp_path: Path
) -> None:
    for name, steps in (("cat", 5), ("dog", 10)):
        job = add(store, name)
        store.claim()
        for step in range(1, steps + 1):
            store.step(job.id, section=1, step=step, seconds=9.0)
    devices = [
        {"name": f"cuda:{number}", "card": "RTX 4090", "job": job, "held": None}
        for number, job in enumerate(("id-cat", "id-dog"))
    ]
    daemon: Any = DAEMON | {"device": "cuda:0, cuda:1", "hardware": "RTX 4090", "devices": devices}
    report = snapshot(store, NOTHING, daemon)
    cat, dog = report["jobs"]
    assert [cat["device"], dog["device"]] == ["cuda:0", "cuda:1"]
    lines = drawn(report).splitlines()
    rows = [line for line in lines if " %  section" in line]
    assert [row.removeprefix("  now").split()[0] for row in rows] == ["cat", "dog"]
    assert len({row.index("%") for row in rows}) == 1, "in columns"
    assert [line.split() for line in lines if "device" in line] == [
        ["device", f"{device['name']}:", "RTX", "4090"] for device in devices
    ]
    assert re.search(r"^cat: \d+ %.*; dog: \d+ %", in_one_line(report, datetime.now(UTC)))
    figures = figures_of(report, store, tmp_path)
    for job in (cat, dog):
        assert f'running_progress_ratio{{device="{job["device"]}"}} {job["progress"]}' in figures
    assert [job["name"] for job in tonight.running(report)] == ["cat", "dog"]


def test_the_page_lays_two_jobs_of_two_devices_along_the_time_of_one(store: JobStore) -> None:
    for name in ("cat", "dog"):
        job = add(store, name)
        store.claim()
        store.step(job.id, section=1, step=1, seconds=9.0)
        store.step(job.id, section=1, step=2, seconds=9.0)
        store.decoded(job.id, section=1, seconds=9.0)
    devices = [{"name": "cpu", "card": None, "job": f"id-{name}", "held": None} for name in ("cat", "dog")]
    daemon: Any = DAEMON | {"devices": devices}
    one, two = snapshot(store, NOTHING, DAEMON), snapshot(store, NOTHING, daemon)
    assert one["eta_seconds"] is not None
    assert two["eta_seconds"] == pytest.approx(one["eta_seconds"] / 2, abs=3)
    assert tonight.night(one).takes == pytest.approx(one["eta_seconds"], abs=2)
    assert tonight.night(two).takes == pytest.approx(two["eta_seconds"], abs=2)


def test_a_job_of_the_queue_reads_the_same_on_terminal_page_and_metrics(
    store: JobStore, tmp_path: Path
) -> None:
    add(store, "cat")
    add(store, "dog")
    store.claim()
    store.step("id-cat", section=1, step=1, seconds=9.0)
    store.step("id-cat", section=1, step=2, seconds=9.0)
    store.decoded("id-cat", section=1, seconds=9.0)
    store.count_attempt("id-cat", "the worker was killed", max_attempts=3)
    reason = "the model demo is not here: framepackd models download demo"
    report = snapshot(store, NOTHING, DAEMON, passed_over={"id-dog": reason})
    cat, dog = report["jobs"]
    assert (cat["note"], dog["note"]) == ("attempt 2", reason)
    assert dog["finishes_at"] is None
    assert report["finishes_at"] == cat["finishes_at"] is not None
    for said in ("attempt 2", reason):
        assert said in on_page("_queue.html", report)
        assert said in drawn(report)
    ends = clock(cat["finishes_at"], datetime.now(UTC))
    assert f"all done {ends}" in in_one_line(report, datetime.now(UTC))
    assert tonight.night(report).clock == of_the_night(cat["ends_at"])
    assert f", at {ends}" in drawn(report)
    figures = figures_of(report, store, tmp_path)
    assert 'jobs{state="queued"} 2.0' in figures
    assert f"queue_eta_seconds {report['eta_seconds']}" in figures


def test_a_job_whose_delivery_waits_reads_the_same_on_terminal_page_and_metrics(
    store: JobStore, tmp_path: Path
) -> None:
    add(store, "cat")
    store.claim()
    store.decide("id-cat", State.DONE)
    again = time.monotonic() + 30
    stands = described(store.get("id-cat"), "outbox /o is full: make room", again)
    report = snapshot(store, NOTHING, DAEMON, delivery=lambda job: stands)
    (job,) = report["jobs"]
    assert job["note"] == "its files cannot be moved: outbox /o is full: make room"
    assert stands is not None
    assert stands["next_try"] is not None
    at = clock(stands["next_try"], datetime.now(UTC), seconds=True)
    assert f"{job['note']}; tried again at {at}" in on_page("_needs.html", report)
    shown = drawn(report)
    assert f"to be done  tried again at {at}" in shown
    assert job["note"] in shown
    figures = figures_of(report, store, tmp_path)
    assert 'undelivered_jobs{reason="outbox /o is full: make room"} 1.0' in figures
    then = float(figures.split("delivery_next_try_time_seconds ")[-1].split("\n")[0])
    assert then == datetime.fromisoformat(stands["next_try"]).timestamp()
    assert (
        describe(whole(store.get("id-cat"), Config(state_dir=tmp_path), stands)) == f"running: {job['note']}"
    )


def test_files_that_wait_read_the_same_on_terminal_and_page(store: JobStore) -> None:
    late = "its job was taken already: drop it again with the picture"
    waiting = (
        Waiting("pets", "cat", ("cat.png",), "cat.txt", utc_now()),
        Waiting("", "dog", ("dog.toml",), late, utc_now()),
    )
    report = snapshot(store, waiting, DAEMON)
    assert [entry["note"] for entry in report["waiting"]] == ["missing: cat.txt", late]
    page = on_page("_needs.html", report)
    for entry in report["waiting"]:
        assert entry["missing"] in page.replace("Its job", "its job")
        assert entry["note"] in drawn(report)
