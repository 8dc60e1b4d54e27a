"""seeds = N: so many jobs of one drop, each with its own seed, files and name; none lost, none doubled."""

import contextlib
import errno
import itertools
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framepack_core.request import MAX_SEED
from framepackd import files
from framepackd.control import commands
from framepackd.delivery import deliveries
from framepackd.intake import resolve, take, take_back
from framepackd.intake.variations import choose_seeds, seed_in
from framepackd.jobs import folder as work_folder
from framepackd.jobs.described import whole
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from tests.daemon.place import Place, at_every_call, undelivered

THREE = "seeds = 3\nseed = 7\n"
SEEDS = (7, 8, 9)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def drop(place: Place, settings: str = THREE) -> None:
    place.drop("sub")
    (place.config.inbox / "sub/cat.toml").write_text(settings)


def queued(place: Place) -> list[Job]:
    return place.store.in_state(State.QUEUED)


def dropped(place: Place) -> list[str]:
    return sorted(path.name for path in (place.config.inbox / "sub").iterdir())


def inputs(place: Place, job: Job) -> dict[str, bytes]:
    folder = place.config.jobs_dir / job.id / work_folder.INPUTS
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def end(place: Place, job: Job, state: State) -> None:
    """Have a job end, and deliver it."""
    place.store.decide(job.id, state, error=None if state is State.DONE else "planted")
    deliveries.settle(place.store.get(job.id), place.config, place.store, take_back.bring_back)


def retry(place: Place, job: Job) -> tuple[bool, str]:
    request = {"command": "retry", "jobs": [job.id]}
    (answer,) = commands.perform(request, commands.Queue(place.config, place.store))["results"]
    return answer["done"], answer["message"]


def test_each_variation_is_a_job_with_a_name_a_seed_and_files_of_its_own(place: Place) -> None:
    drop(place)
    original = {path.suffix: path.read_bytes() for path in (place.config.inbox / "sub").iterdir()}
    place.take()
    jobs = queued(place)
    assert [job.name for job in jobs] == [f"cat_seed_{seed}" for seed in SEEDS]
    assert [job.record()["seed"] for job in jobs] == list(SEEDS)
    assert len({job.fingerprint for job in jobs}) == 3
    for job in jobs:
        assert inputs(place, job) == {f"{job.name}{suffix}": original[suffix] for suffix in sorted(original)}
        end(place, job, State.FAILED)
    names = {path.name for path in (place.config.failed / "sub").iterdir()}
    suffixes = (".png", ".txt", ".toml", ".error.txt")
    assert names == {f"cat_seed_{seed}{suffix}" for seed in SEEDS for suffix in suffixes}
    assert not list(place.config.jobs_dir.iterdir())


def test_a_variation_is_what_a_job_with_that_seed_would_be(place: Place) -> None:
    drop(place)
    place.take()
    variation = queued(place)[1]
    drop(place, "seed = 8\n")
    single = place.take()
    assert single.settings == variation.settings
    assert single.fingerprint == variation.fingerprint, "so that on_duplicate knows it"


def test_random_seeds_are_drawn_for_each_and_recorded(place: Place) -> None:
    drop(place, 'seeds = 5\nseed = "random"\n')
    place.take()
    jobs = queued(place)
    assert len({job.settings["seed"] for job in jobs}) == 5
    assert all(job.name == f"cat_seed_{job.settings['seed']}" for job in jobs)


def test_a_drawn_seed_is_shown_wherever_the_job_is(place: Place) -> None:
    drop(place, 'seed = "random"\n')
    job = place.take()
    assert job.name == "cat"
    seed = job.settings["seed"]
    assert isinstance(seed, int)
    assert whole(job, place.config)["seed"] == seed, "as show prints it"
    place.generate()
    end(place, job, State.DONE)
    assert json.loads((place.config.outbox / "sub/cat.json").read_text())["seed"] == seed


@given(first=st.integers(0, MAX_SEED), count=st.integers(1, 64))
def test_seeds_count_up_and_wrap_around(first: int, count: int) -> None:
    seeds = choose_seeds(first, count)
    assert seeds[0] == first
    assert all((one + 1) % 2**32 == other for one, other in itertools.pairwise(seeds))


def take_what_is_left(place: Place, count: int) -> None:
    """Start again after a crash, and have everything taken in once."""
    take.adopt_leftovers(place.config, place.store)
    place.take() if dropped(place) else None
    for _ in range(2):
        jobs = queued(place)
        assert len(jobs) == len({job.settings["seed"] for job in jobs}) == count, "none lost, none doubled"
        for job in jobs:
            assert job.name == f"cat_seed_{job.settings['seed']}"
            assert list(inputs(place, job)) == [f"{job.name}{suffix}" for suffix in (".png", ".toml", ".txt")]
        assert not dropped(place)
        assert {path.name for path in place.config.jobs_dir.iterdir()} == {job.id for job in jobs}
        take.adopt_leftovers(place.config, place.store)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (THREE, 3),
        pytest.param('seeds = 2\nseed = "random"\n', 2, marks=pytest.mark.long),
    ],
)
def test_taking_variations_in_survives_dying_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, count: int
) -> None:
    places = iter(Place(tmp_path / str(number)) for number in range(500))
    place = next(places)
    drop(place, settings)

    def start_again_and_check() -> None:
        nonlocal place
        take_what_is_left(place, count)
        place = next(places)
        drop(place, settings)

    assert at_every_call(monkeypatch, lambda: place.take(), start_again_and_check) > 30


def test_without_room_for_the_copies_the_files_are_put_back_dying_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = iter(Place(tmp_path / str(number)) for number in range(500))
    place = next(places)
    drop(place, "seeds = 2\nseed = 7\n")

    def take_without_room() -> None:
        copy = files.copy

        def full(source: Path, target: Path) -> None:
            if target.name == "cat_seed_8.txt":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            copy(source, target)

        with monkeypatch.context() as patched, contextlib.suppress(OSError):
            patched.setattr(files, "copy", full)
            place.take()
        assert dropped(place) == ["cat.png", "cat.toml", "cat.txt"]
        assert not queued(place)
        assert not list(place.config.jobs_dir.iterdir())

    def start_again_and_check() -> None:
        nonlocal place
        take_what_is_left(place, 2)
        place = next(places)
        drop(place, "seeds = 2\nseed = 7\n")

    assert at_every_call(monkeypatch, take_without_room, start_again_and_check) > 30


def test_without_the_database_every_variation_is_taken_in_again_with_its_seed(place: Place) -> None:
    drop(place, 'seeds = 3\nseed = "random"\n')
    place.take()
    before = {job.id: job.settings for job in queued(place)}
    for file in place.config.state_dir.glob("framepackd.db*"):
        file.unlink()
    place.store = JobStore(place.config.database)
    take.adopt_leftovers(place.config, place.store)
    assert {job.id: job.settings for job in queued(place)} == before


def test_a_mistake_fails_once_and_not_for_every_variation(place: Place) -> None:
    drop(place, "seeds = 3\nsteps = 0\n")
    place.take()
    (job,) = undelivered(place.store)
    assert (job.name, (job.delivery or {})["state"]) == ("cat", State.FAILED)


@pytest.mark.parametrize("seeds", ["0", "65", "true", '"many"'])
def test_a_number_of_seeds_out_of_range_is_refused(place: Place, seeds: str) -> None:
    drop(place, f"seeds = {seeds}\n")
    place.take()
    (job,) = undelivered(place.store)
    assert re.search("seeds must be (a whole number from )?1 to 64, got", (job.delivery or {})["error"])


def test_what_is_done_is_skipped_variation_by_variation(place: Place) -> None:
    drop(place)
    place.take()
    place.generate()  # the first one in the queue
    (first,) = place.store.in_state(State.RUNNING)
    end(place, first, State.DONE)
    place.config = place.config.model_copy(update={"on_duplicate": "skip"})
    drop(place)
    place.take()
    decided = {job.name: (job.delivery or {})["state"] for job in undelivered(place.store)}
    assert decided == {"cat_seed_7": State.SKIPPED}
    assert sorted(job.name for job in queued(place) if job.delivery is None) == [
        *(["cat_seed_8"] * 2),
        *(["cat_seed_9"] * 2),
    ]


def test_a_delivered_variation_dropped_again_is_one_job(place: Place) -> None:
    drop(place)
    place.take()
    (job, *others) = queued(place)
    for name, content in inputs(place, job).items():
        (place.config.inbox / name).write_bytes(content)
    place.take()
    known = {other.id for other in (job, *others)}
    (again,) = [other for other in queued(place) if other.id not in known]
    assert (again.name, again.fingerprint) == ("cat_seed_7", job.fingerprint)
    assert seed_in("cat_seed_4294967296") is None, "no seed is as large"


def test_variations_of_a_chain_are_chains(place: Place) -> None:
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(place.config.inbox / f"cat_frame_{number}.png")
    (place.config.inbox / "cat.txt").write_text("pan left")
    (place.config.inbox / "cat.toml").write_text("seeds = 2")
    place.take()
    jobs = queued(place)
    assert [(job.clips, job.settings["seed"]) for job in jobs] == [(2, 31337), (2, 31338)]
    for job in jobs:
        names = [f"{job.name}_frame_{number}.png" for number in range(3)]
        assert list(inputs(place, job)) == sorted([*names, f"{job.name}.toml", f"{job.name}.txt"])


def test_pictures_are_read_once_for_all_variations(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look may take seconds, in which the loop does nothing else."""
    looked: list[str] = []
    size = resolve.picture_size
    monkeypatch.setattr(
        resolve, "picture_size", lambda path, tell: looked.append(path.name) or size(path, tell)
    )
    drop(place)
    place.take()
    assert looked == ["cat.png"]


def test_a_variation_is_tried_again_with_its_own_seed(place: Place) -> None:
    drop(place)
    place.take()
    job = queued(place)[2]
    end(place, job, State.FAILED)
    done, message = retry(place, job)
    assert done, message
    assert place.store.get(job.id).settings["seed"] == 9
    manifest = json.loads((place.config.jobs_dir / job.id / work_folder.MANIFEST).read_text())
    assert manifest["seed"] == 9, "also where the database is lost"


def test_a_job_corrected_in_the_failed_folder_cannot_become_several(place: Place) -> None:
    drop(place, "seeds = 3\nsteps = 0\n")
    place.take()
    (job,) = undelivered(place.store)
    deliveries.settle(job, place.config, place.store, take_back.bring_back)
    (place.config.failed / "sub/cat.toml").write_text("seeds = 3\nsteps = 1\n")
    done, message = retry(place, job)
    assert not done
    assert "drop the files again" in message
    assert (place.config.failed / "sub/cat.png").exists()


def test_late_companions_and_commands_find_variations_by_name(place: Place) -> None:
    drop(place)
    place.take()
    found = place.store.taken_as([("sub", "cat")])
    assert found == {("sub", "cat"): queued(place)[-1].id}
    assert place.store.find("sub/cat") is not None
    assert place.store.find("sub/ca") is None
