"""Pictures for sections within one video, by their names or by the settings."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framepack_core.engine import Clip, Engine
from framepackd.control import commands
from framepackd.delivery import deliveries
from framepackd.inbox.naming import Group, group_files
from framepackd.inbox.scan import Inbox
from framepackd.intake import take, take_back
from framepackd.jobs import folder
from framepackd.jobs.job import Job, State
from framepackd.settings.config import ConfigError, load_config
from framepackd.supervisor.work import clips
from tests.conftest import tiny_spec
from tests.daemon.place import Place, at_every_call, undelivered

POSE = 'keyframes = {"0" = "pose.png"}\n'


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def drop(place: Place, *pictures: str, settings: str = "") -> None:
    """Drop a job's files, with more pictures, of four sections each."""
    place.drop()
    for number, name in enumerate(pictures):
        Image.new("RGB", (48, 32), (0, number, 9)).save(place.config.inbox / name)
    if settings:
        (place.config.inbox / "cat.toml").write_text(settings)


def waiting(place: Place) -> dict[str, str]:
    return {entry.name: entry.missing for entry in Inbox(place.config.inbox, 0).scan().waiting}


def inputs(place: Place, job: Job) -> Path:
    return place.config.jobs_dir / job.id / folder.INPUTS


def error(place: Place) -> str:
    place.take()
    (job,) = undelivered(place.store)
    assert job.delivery is not None
    return str(job.delivery["error"])


def taken_and_failed(place: Place) -> Job:
    """Take the job in and have it fail: its files lie in the failed folder."""
    job = place.take()
    place.store.claim()
    place.store.decide(job.id, State.FAILED, error="planted")
    deliveries.settle(place.store.get(job.id), place.config, place.store, take_back.bring_back)
    return job


def test_pictures_named_by_section_are_the_keyframes_of_their_name(place: Place) -> None:
    drop(place, "cat_section_0.png", "cat_section_2.png")
    job = place.take()
    (clip,) = clips(job, inputs(place, job), place.config.lora_dir)
    assert {section: file.name for section, file in clip.keyframes.items()} == {
        0: "cat_section_0.png",
        2: "cat_section_2.png",
    }
    assert job.record()["keyframes"] == {"0": "cat_section_0.png", "2": "cat_section_2.png"}
    assert len(job.inputs["keyframe-2"]["sha256"]) == 64


def test_pictures_named_in_the_settings_are_waited_for_and_delivered_under_the_jobs_name(
    place: Place,
) -> None:
    drop(place, settings=POSE)
    assert waiting(place) == {"cat": "pose.png"}
    Image.new("RGB", (32, 32)).save(place.config.inbox / "pose.png")
    job = place.take()
    assert job.settings["keyframes"] == {"0": "cat_section_0.png"}
    assert (inputs(place, job) / "cat_section_0.png").exists()
    assert not list(place.config.inbox.iterdir())


def test_delivered_and_dropped_again_the_settings_find_the_picture_under_its_new_name(place: Place) -> None:
    drop(place, "pose.png", settings=POSE)
    first = taken_and_failed(place)
    for path in place.config.failed.glob("cat[!.]*"):
        path.rename(place.config.inbox / path.name)
    for name in ("cat.png", "cat.txt", "cat.toml"):
        (place.config.failed / name).rename(place.config.inbox / name)
    again = place.take()
    assert again.id != first.id
    assert again.fingerprint == first.fingerprint


def test_a_failed_job_comes_back_with_its_keyframes(place: Place) -> None:
    drop(place, "pose.png", settings=POSE)
    job = taken_and_failed(place)
    assert (place.config.failed / "cat_section_0.png").exists()
    request = {"command": "retry", "jobs": ["cat"]}
    (answer,) = commands.perform(request, commands.Queue(place.config, place.store))["results"]
    assert answer["done"], answer
    (clip,) = clips(place.store.get(job.id), inputs(place, job), place.config.lora_dir)
    assert clip.keyframes[0].exists()


def test_taking_in_a_picture_under_another_name_survives_dying_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = iter(Place(tmp_path / str(number)) for number in range(500))
    place = next(places)
    drop(place, "pose.png", settings=POSE)

    def start_again_and_check() -> None:
        nonlocal place
        take.adopt_leftovers(place.config, place.store)
        place.take()
        (job,) = place.store.in_state(State.QUEUED)
        names = sorted(path.name for path in inputs(place, job).iterdir())
        assert names == ["cat.png", "cat.toml", "cat.txt", "cat_section_0.png"]
        assert not list(place.config.inbox.iterdir())
        place = next(places)
        drop(place, "pose.png", settings=POSE)

    assert at_every_call(monkeypatch, lambda: place.take(), start_again_and_check) > 10


def test_a_file_that_changed_meanwhile_is_put_back_under_the_name_it_had(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(place, "pose.png", settings=POSE)

    def fail(*_: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(take.files, "sync_folder", counting(take.files.sync_folder, fail, at=3))
    with pytest.raises(OSError, match="input/output"):
        place.take()
    names = sorted(path.name for path in place.config.inbox.iterdir())
    assert names == ["cat.png", "cat.toml", "cat.txt", "pose.png"]


def counting(call: Callable[..., None], other: Callable[..., None], at: int) -> Callable[..., None]:
    """Have the so-manieth call be another."""
    left = iter(range(1, 1000))
    return lambda *arguments: (other if next(left) == at else call)(*arguments)


@pytest.mark.parametrize(
    ("keyframes", "told"),
    [
        ('{"0" = "../pose.png"}', "without a path; '../pose.png' is none"),
        ('{"0" = "/etc/hostname"}', "without a path"),
        ('{"0" = "sub/pose.png"}', "without a path"),
        ('{"0" = ".hidden.png"}', "without a path"),
        ('{"0" = 5}', "without a path; 5 is none"),
        ('{"-1" = "pose.png"}', "must count sections from 0"),
        ('{"first" = "pose.png"}', "must count sections from 0"),
        ('{"0" = "pose.png", "1" = "pose.png"}', "each picture once"),
        ('{"0" = "pose.png", "00" = "b.png"}', "each section"),
        ('"pose.png"', "must be a table of sections and pictures"),
        ('{"0" = "pose.pdf"}', "keyframes names pose.pdf, and no such picture came"),
        ('{"4" = "pose.png"}', "cat_section_4.png is for section 4, but the video has 4: 0, its end, to 3"),
    ],
)
def test_a_wrong_keyframe_fails_and_says_why(place: Place, keyframes: str, told: str) -> None:
    drop(place, "pose.png", settings=f"keyframes = {keyframes}\n")
    assert told in error(place)


def test_a_model_that_generates_forward_refuses_keyframes(place: Place) -> None:
    drop(place, "cat_section_0.png", settings='model = "f1"')
    assert "cannot aim at an end frame or keyframes" in error(place)


def test_settings_of_many_jobs_name_no_pictures(place: Place, tmp_path: Path) -> None:
    drop(place)
    (place.config.inbox / "_defaults.toml").write_text(POSE)
    assert "put it into its NAME.toml" in waiting(place)["cat"]
    (tmp_path / "config.toml").write_text(f"[defaults]\n{POSE}")
    with pytest.raises(ConfigError, match=r"\[defaults\]: keyframes names the pictures of one job"):
        load_config(tmp_path / "config.toml")


def test_a_picture_of_another_job_is_not_taken(place: Place) -> None:
    drop(place, "dog.png", settings='keyframes = {"0" = "dog.png"}')
    (place.config.inbox / "dog.txt").write_text("pan left")
    assert waiting(place) == {"cat": "dog.png is used already: give keyframe 0 of cat a picture of its own"}
    (place.config.inbox / "cat.toml").write_text('keyframes = {"0" = "cat.png"}')
    assert "cat.png is used already" in waiting(place)["cat"]


def test_of_two_jobs_that_name_one_picture_one_waits(place: Place) -> None:
    drop(place, "dog.png", "pose.png", settings=POSE)
    (place.config.inbox / "dog.txt").write_text("pan left")
    (place.config.inbox / "dog.toml").write_text(POSE)
    assert waiting(place) == {"dog": "pose.png is used already: give keyframe 0 of dog a picture of its own"}


def test_the_pictures_belong_to_the_fingerprint_and_their_names_do_not(place: Place) -> None:
    prints = []
    for name, colour, settings in (
        ("pose.png", "red", POSE),
        ("cat_section_0.png", "red", "seed = 31337"),
        ("cat_section_0.png", "blue", "seed = 31337"),
        ("cat_section_1.png", "red", "seed = 31337"),
    ):
        drop(place, settings=settings)
        Image.new("RGB", (32, 32), colour).save(place.config.inbox / name)
        prints.append(place.take().fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_in_a_chain_sections_are_counted_over_all_clips(place: Place) -> None:
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(place.config.inbox / f"cat_frame_{number}.png")
    Image.new("RGB", (32, 32), "red").save(place.config.inbox / "cat_section_5.png")
    (place.config.inbox / "cat.txt").write_text("pan left")
    job = place.take()
    first, second = clips(job, inputs(place, job), place.config.lora_dir)
    assert not first.keyframes
    assert {section: file.name for section, file in second.keyframes.items()} == {1: "cat_section_5.png"}


def test_variations_take_their_keyframes_along(place: Place) -> None:
    drop(place, "pose.png", settings=f"{POSE}seeds = 2")
    place.take()
    for job in place.store.in_state(State.QUEUED):
        assert (inputs(place, job) / f"{job.name}_section_0.png").exists()
        assert job.settings["keyframes"] == {"0": f"{job.name}_section_0.png"}
        manifest = json.loads((place.config.jobs_dir / job.id / folder.MANIFEST).read_text())
        assert manifest["name"] == job.name


def test_a_keyframe_changes_its_section_and_what_is_made_after_it(place: Place) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(place.config.inbox / "cat.png")
    Image.fromarray(pixels[1]).save(place.config.inbox / "cat_section_0.png")
    (place.config.inbox / "cat.txt").write_text("pan left")
    small = "latent_window_size = 3\nseconds = 1\nsteps = 1\nwidth = 48\nheight = 32\n"
    (place.config.inbox / "cat.toml").write_text(small)
    job = place.take()
    (clip,) = clips(job, inputs(place, job), place.config.lora_dir)
    engine = Engine.load(tiny_spec("framepack-i2v"), "cpu")
    without = clip.model_copy(update={"keyframes": {}})
    made = [
        [event.latents for event in engine.generate(request) if isinstance(event, Clip)][-1]
        for request in (clip, without)
    ]
    assert made[0].shape == made[1].shape
    assert not made[0].equal(made[1])


@given(
    names=st.lists(st.sampled_from(["a.png", "b.png", "a.toml", "b.txt", "a_section_1.png", "c.png"])),
    named=st.dictionaries(st.integers(0, 3), st.sampled_from(["a.png", "b.png", "c.png", "d.png"])),
)
def test_whatever_settings_name_every_file_is_in_exactly_one_group(
    names: list[str], named: dict[int, str]
) -> None:
    files = sorted(set(names))
    groups: list[Group] = group_files(files, {"a.toml": named} if "a.toml" in files else {})
    assert sorted(path for group in groups for path in group.paths) == files
