"""Whatever dies or fails, and whenever: no job is lost, none is made twice, and every video is the same.

The short form of ``python -m tests.crash``, which does this hundreds of times.
"""

import contextlib
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framepackd.control import client, socket
from framepackd.jobs.job import State
from framepackd.settings.config import load_config
from tests.crash import faults
from tests.crash.disk import Disk, unusable
from tests.crash.harness import IN_WORKERS, Baseline, Campaign, Life, undisturbed
from tests.crash.jobs import Folders
from tests.crash.victim import Plan
from tests.daemon.intake.studio import Studio

JOBS = ("end", "chain", "cached", "forward", "wrong")
# The so-manieth point of each phase that is come by after a start, in the order in which a job does.
KILLS = [
    Plan(labels=(f"{phase}:",), occurrence=occurrence)
    for phase, occurrence in (
        ("start", 3),
        ("intake", 12),
        ("claim", 2),
        ("step", 3),
        ("checkpoint", 11),
        ("decode", 3),
        ("preview", 3),
        ("encode", 10),
        ("publish", 8),
        ("finish", 1),
        ("page", 3),
        ("publish", 30),
    )
]
POWER_CUTS = [
    Plan(labels=(f"{phase}:",), occurrence=occurrence)
    for phase, occurrence in (
        ("intake", 20),
        ("checkpoint", 20),
        ("encode", 5),  # all sections are decoded
        ("publish", 6),
    )
]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = tmp_path_factory.mktemp("undisturbed")
    return undisturbed(Folders(folder, folder, JOBS))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    reason = unusable()
    if reason:
        pytest.skip(reason)
    disk = Disk(tmp_path)
    yield disk
    disk.unmount()


def run_and_check(campaign: Campaign, plans: list[Plan]) -> None:
    campaign.queue(iter(plans))
    assert campaign.good, campaign.report()
    assert campaign.kills == len(plans), campaign.report()


# Each start costs seconds of processor time. Tests of their own die at each line of intake, checkpoint and
# delivery: in the short form it is these, where processes hand over.
HANDING_OVER = ("claim", "step", "decode", "encode", "finish")


@pytest.mark.parametrize(
    "kills",
    [
        [plan for plan in KILLS if plan.labels[0].rstrip(":") in HANDING_OVER],
        pytest.param(KILLS, marks=pytest.mark.long),
    ],
    ids=["between processes", "everywhere"],
)
def test_killed_in_every_phase_the_queue_is_done_as_if_nothing_had_been(
    baseline: Baseline, tmp_path: Path, kills: list[Plan]
) -> None:
    folders = Folders(tmp_path, tmp_path, JOBS)
    run_and_check(Campaign(folders, baseline, random.Random(1)), kills)


def test_with_two_devices_killed_workers_and_daemons_make_what_one_device_makes(
    baseline: Baseline, tmp_path: Path
) -> None:
    """A kill costs each running job one computed step at most."""
    folders = Folders(tmp_path, tmp_path, JOBS, devices=2)
    campaign = Campaign(folders, baseline, random.Random(1))
    total = sum(number for label, number in baseline.points.items() if label.startswith(IN_WORKERS))
    plans = [
        Plan(labels=IN_WORKERS, occurrence=20),
        Plan(labels=IN_WORKERS, occurrence=10, every=total // 13, whom=(*["this"] * 6, "workers")),
    ]
    campaign.queue(iter(plans))
    assert campaign.good, campaign.report()
    assert campaign.kills >= 15, campaign.report()


@pytest.mark.long
def test_with_two_devices_a_hundred_kills_make_what_one_device_makes(tmp_path: Path) -> None:
    baseline = undisturbed(Folders(tmp_path / "one", tmp_path / "one"))
    campaign = Campaign(Folders(tmp_path, tmp_path, devices=2), baseline, random.Random(1))
    campaign.run(100)
    assert campaign.good, campaign.report()


@pytest.mark.long  # tests/daemon/intake/test_drafts.py dies at each line of the taking in
def test_killed_while_a_final_is_taken_in_and_while_it_is_made_there_is_one_of_all_its_steps(
    tmp_path: Path,
) -> None:
    studio, folders = Studio(tmp_path, "backward"), Folders(tmp_path, tmp_path)
    with folders.config.open("a") as file:
        file.write("[draft]\nsteps = 1\n")
    studio.config = load_config(folders.config)
    studio.picture(draft=True, steps=3, seconds=1)
    studio.make()
    request = {"command": "final", "jobs": ["cat"]}
    taken_in = Plan(labels=("intake:take.take_final:rename",))
    for plan in (taken_in, Plan(labels=("step:",), occurrence=3)):
        with Life(folders, plan, once=False) as life:
            while not life.fired and life.alive:
                with contextlib.suppress(OSError):  # it starts, or has just been killed
                    socket.ask(studio.config.state_dir, request)
                time.sleep(0.05)
            assert life.end() == -signal.SIGKILL, life.log.read_text()
    with Life(folders) as life:
        assert life.end() == 0, life.log.read_text()
    (answer,) = client.perform(studio.config, request)
    assert "has a final: job" in answer["message"], answer
    _, final = studio.store.in_state(*State)
    assert (final.path, final.state, final.sections) == ("cat_final", State.DONE, 2)
    assert final.steps_total == 6 <= final.steps_run <= 7, "at most one step is lost to a kill"
    assert sorted(path.name for path in studio.outbox.glob("*.mp4")) == ["cat.mp4", "cat_final.mp4"]


@pytest.mark.long
def test_without_power_in_every_phase_the_queue_is_done_as_if_nothing_had_been(
    baseline: Baseline, disk: Disk, tmp_path: Path
) -> None:
    folders = Folders(disk.root, tmp_path, JOBS)
    run_and_check(Campaign(folders, baseline, random.Random(1), disk), POWER_CUTS)


def test_a_full_and_a_failing_disk_cost_no_job_and_no_attempt(
    baseline: Baseline, disk: Disk, tmp_path: Path
) -> None:
    trial = faults.Trial(Folders(disk.root, tmp_path, JOBS), baseline, random.Random(1), disk)
    outcome = trial.run([faults.fill_the_disk, faults.fail_the_disk])
    assert outcome.clean, outcome


@pytest.mark.long
def test_stopped_and_suspended_it_goes_on_where_it_was(baseline: Baseline, tmp_path: Path) -> None:
    trial = faults.Trial(Folders(tmp_path, tmp_path, JOBS), baseline, random.Random(1))
    outcome = trial.run([faults.terminate, faults.jump, faults.suspend])
    assert outcome.clean, outcome


@pytest.mark.long
@pytest.mark.parametrize("kind", faults.TARGETS_ON_A_DISK)
def test_an_outbox_that_hangs_or_goes_away_costs_nothing(
    baseline: Baseline, disk: Disk, tmp_path: Path, kind: str
) -> None:
    folders = Folders(tmp_path, tmp_path, JOBS, targets=disk.root)
    outcome = faults.Trial(folders, baseline, random.Random(1), disk).run([faults.HARMS[kind]] * 2)
    assert outcome.clean, outcome


@pytest.mark.long
def test_what_is_not_framepackds_is_left_alone(baseline: Baseline, tmp_path: Path) -> None:
    trial = faults.Trial(Folders(tmp_path, tmp_path, JOBS), baseline, random.Random(1))
    outcome = trial.run([faults.plant_foreign_entries])
    assert outcome.clean, outcome
