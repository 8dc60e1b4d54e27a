"""The bar and the estimate of a job count its decodes, by the clock. The figures are the demo model's."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from framepackd.jobs.job import Job, State
from framepackd.jobs.pace import progress, remaining
from framepackd.jobs.store import JobStore

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
STEP, DECODES = 0.25, (10.0, 22.0)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def reported(*, section: int, step: int, when: float = 0.0, decode: float | None = 16.0) -> Job:
    """Give a job of two sections with four steps each that reported at a time."""
    job = Job(id="lake", state=State.RUNNING, settings={"latent_window_size": 9}, step_seconds=STEP)
    job.width, job.height, job.sections, job.steps_total = 240, 160, 2, 8
    job.section, job.step, job.steps_beyond, job.decode_seconds = section, step, 0, decode
    job.progress_at = at(when).isoformat()
    return job


def left(job: Job, when: float = 0.0, like: Job | None = None) -> float:
    seconds = remaining(job, like, at(when))
    assert seconds is not None
    return seconds


def test_the_bar_moves_while_a_section_is_decoded() -> None:
    job = reported(section=2, step=4)
    shares = [progress(job, at(second)) or 0.0 for second in (0, 4, 8, 12, 16, 20)]
    moved = [later - earlier for earlier, later in pairwise(shares)]
    assert shares[0] == pytest.approx(0.5 + 0.5 / 17, abs=1e-3), "sampling is the least of it"
    assert moved[:4] == pytest.approx([4 / 17 / 2] * 4, abs=1e-3)
    assert (shares[-1], moved[-1]) == (1.0, 0.0)


def test_before_a_decode_was_measured_it_counts_half_of_its_section() -> None:
    assert progress(reported(section=1, step=4, decode=None), NOON) == 0.25
    assert progress(reported(section=2, step=0, decode=None), NOON) == 0.5


def test_while_a_section_is_decoded_the_estimate_runs_down_with_the_clock() -> None:
    job = reported(section=1, step=4)
    assert left(job) == pytest.approx(16 + 4 * STEP + 16)
    assert left(job, 6) == pytest.approx(left(job) - 6)


def test_no_end_is_promised_while_nobody_knows_how_long_a_decode_takes() -> None:
    """It said "in 0 s" before the decode that was nearly all of the job."""
    job = reported(section=1, step=4, decode=None)
    assert remaining(job, None, NOON) is None
    assert left(job, like=reported(section=2, step=4)) == pytest.approx(16 + 4 * STEP + 16)


def test_what_takes_longer_than_expected_never_ends_in_0_seconds() -> None:
    job = reported(section=2, step=4)
    assert [left(job, second) for second in (15, 20, 40)] == pytest.approx([1.0, 2.0, 4.0])
    assert left(job, 36_000) == pytest.approx(16), "nor is it put off for ever"


def test_the_second_job_is_estimated_by_the_mean_of_the_firsts_decodes(tmp_path: Path) -> None:
    """The decodes of a video differ: smoothed from the first one, they summed up to a quarter too little."""
    store = JobStore(tmp_path / "framepackd.db")
    first = reported(section=0, step=0, decode=None)
    first.name, first.state, first.created_at = "lake", State.QUEUED, at(0).isoformat()
    first.step_seconds = None
    store.add(first)
    store.claim()
    for section, seconds in enumerate(DECODES, 1):
        for step in range(1, 5):
            store.step("lake", section=section, step=step, seconds=STEP)
        store.decoded("lake", section=section, seconds=seconds)
        assert (store.get("lake").section, store.get("lake").step) == ((2, 0) if section == 1 else (2, 4))
    second = reported(section=0, step=0, decode=None)
    second.step_seconds = None
    assert left(second, like=store.get("lake")) == pytest.approx(8 * STEP + sum(DECODES))


def test_the_writing_after_the_last_decode_does_not_set_the_bar_back(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "framepackd.db")
    job = reported(section=0, step=0, decode=None)
    job.name, job.state, job.created_at = "lake", State.QUEUED, at(0).isoformat()
    store.add(job)
    store.claim()
    store.step("lake", section=2, step=4, seconds=STEP)
    before = store.get("lake").progress_at
    store.decoded("lake", section=2, seconds=22.0)
    assert store.get("lake").progress_at == before


def test_what_other_devices_have_done_of_a_chain_counts(tmp_path: Path) -> None:
    alone, helped = reported(section=1, step=2), reported(section=1, step=2)
    helped.steps_beyond = 4  # of the second section, all
    done, further = progress(alone, at(0)), progress(helped, at(0))
    assert done is not None
    assert further == pytest.approx(done + 0.5)
    assert left(alone) - left(helped) == pytest.approx(4 * STEP + (alone.decode_seconds or 0))
