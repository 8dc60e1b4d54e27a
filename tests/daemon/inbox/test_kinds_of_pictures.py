"""Pictures of all kinds from the inbox on: which are taken, what is said of the rest, what is recorded."""

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from framepack_core.media import heif
from framepack_core.media.pictures import open_picture
from framepackd.cli import display, page_of_job
from framepackd.inbox import inspect
from framepackd.inbox.scan import Inbox
from framepackd.intake import resolve
from framepackd.jobs import job as database_job
from framepackd.jobs.folder import INPUTS
from framepackd.supervisor.supervisor import Supervisor
from framepackd.supervisor.work import clips
from framepackd.web import drop
from tests.core.media import icc
from tests.core.media.photo import PHOTO, needs_pi_heif
from tests.daemon.loop import Loop
from tests.daemon.place import Place
from tests.daemon.worker.jobs import ENGINES, work_in


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


@pytest.fixture(params=["with pi-heif", "without it"])
def readable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Say whether HEIC can be read, which it is made to be or not to be."""
    if request.param == "without it":
        monkeypatch.setitem(sys.modules, "pi_heif", None)
    elif not heif.available():
        monkeypatch.setattr(heif, "available", lambda: True)
    return heif.available()


def waiting(place: Place) -> dict[str, str]:
    return {entry.name: entry.missing for entry in Inbox(place.config.inbox, 0).scan().waiting}


# Kinds


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".avif", ".AVIF", ".png"])
def test_a_picture_of_any_kind_that_is_read_becomes_a_job(place: Place, suffix: str) -> None:
    form = "AVIF" if suffix.lower() == ".avif" else "JPEG"
    Image.new("RGB", (32, 32)).save(place.config.inbox / f"cat{suffix}", form)
    (place.config.inbox / "cat.txt").write_text("pan left")
    assert place.take().delivery is None


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".hif"])
def test_heic_is_taken_if_it_can_be_read_and_else_reported_with_its_text(
    place: Place, suffix: str, readable: bool
) -> None:
    (place.config.inbox / f"cat{suffix}").write_bytes(PHOTO.read_bytes())
    if readable:
        assert waiting(place) == {"cat": "cat.txt"}
        return
    (place.config.inbox / "cat.txt").write_text("pan left")
    told = waiting(place)
    assert set(told) == {"cat", f"cat{suffix}"}
    assert f"cat.png is missing, and cat{suffix} is not of a known type" in told["cat"]
    assert all("this is HEIC, from an iPhone" in text for text in told.values())


@needs_pi_heif
def test_a_photo_of_an_iphone_becomes_a_job_whatever_it_is_called(place: Place) -> None:
    for name in ("cat.heic", "dog.jpg"):
        (place.config.inbox / name).write_bytes(PHOTO.read_bytes())
        (place.config.inbox / name).with_suffix(".txt").write_text("pan left")
    place.take()
    jobs = place.store.in_state(database_job.State.QUEUED)
    assert [(job.delivery, job.width > job.height) for job in jobs] == [(None, True)] * 2


@pytest.mark.parametrize("name", ["cat.gif", "cat_first_frame.TIFF", "cat.psd"])
def test_a_text_whose_picture_is_of_an_unknown_type_waits_and_says_so(place: Place, name: str) -> None:
    for dropped in (name, "cat.txt"):
        (place.config.inbox / dropped).write_text("x")
    told = waiting(place)
    assert set(told) == {"cat", name}
    unread = f"{name} is not of a known type: if it is a picture, save it as PNG or JPEG"
    assert told["cat"] == f"cat.png is missing, and {unread}"


@pytest.mark.parametrize("name", ["cat_end.gif", "cat_section_0.tiff", "cat.end.psd"])
def test_an_end_frame_of_an_unknown_type_holds_its_job_back(place: Place, name: str) -> None:
    place.drop()
    (place.config.inbox / name).write_text("x")
    told = waiting(place)
    assert told["cat"].startswith(f"{name} is not of a known type")


def test_once_names_what_it_leaves_in_the_inbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, once=True)
    for name in ("cat.gif", "dog.png"):
        (loop.place.config.inbox / name).write_text("x")
    assert loop.daemon.run() == 0
    assert "cat.gif is left in the inbox: cat.gif is not of a known type" in caplog.text
    assert "dog is left in the inbox: it waits for dog.txt" in caplog.text


def test_the_page_takes_no_photo_that_would_wait(place: Place, tmp_path: Path, readable: bool) -> None:
    photo = tmp_path / "cat.HEIC"
    photo.touch()
    if readable:
        name = drop.drop(place.config, picture=photo, prompt="x", settings={})
        assert (place.config.inbox / drop.FOLDER / f"{name}.heic").exists()
    else:
        with pytest.raises(drop.RequestError, match=r"the picture is a \.heic: this is HEIC, from an iPhone"):
            drop.drop(place.config, picture=photo, prompt="x", settings={})


# What is passed over


def test_a_profile_that_cannot_be_used_is_recorded_and_shown_of_every_job(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    profile = icc.grey(icc.gamma(1.0))
    Image.new("RGB", (32, 32)).save(place.config.inbox / "cat.png", icc_profile=profile)
    (place.config.inbox / "cat.toml").write_text("prompt = 'a'\nseeds = 2")
    place.take()
    told = "cat.png: its colour profile is ignored: it is for grey, and the picture is of RGB"
    jobs = place.store.in_state(database_job.State.QUEUED)
    assert len(jobs) == 2
    for job in jobs:
        assert job.inputs["image"]["passed_over"] == [told]
        assert job.record()["inputs"]["image"]["passed_over"] == [told]
    assert told in caplog.text
    console = display.Console(width=240, record=True)
    console.print(page_of_job.page(jobs[0].record() | {"history": []}, datetime.now(UTC)))
    assert told in console.export_text()


def test_pictures_are_looked_at_as_the_worker_reads_them(tmp_path: Path) -> None:
    told: list[str] = []
    Image.new("P", (32, 16)).save(tmp_path / "a.png", icc_profile=icc.rgb(icc.DISPLAY_P3, icc.gamma(2.2)))
    assert inspect.picture_size(tmp_path / "a.png", told.append) == (16, 32)
    expected: list[str] = []
    open_picture(tmp_path / "a.png", tell=expected.append)
    assert told == expected != []


# The background


def clear(path: Path) -> None:
    Image.new("RGBA", (32, 32), (200, 10, 10, 0)).save(path)


def test_the_background_is_recorded_asked_for_and_part_of_what_makes_a_duplicate(place: Place) -> None:
    prints = []
    for number, settings in enumerate(("", 'background = "#FFFFFF"', 'background = "#00ff7F"')):
        clear(place.config.inbox / f"cat{number}.png")
        (place.config.inbox / f"cat{number}.toml").write_text(f"prompt = 'a'\n{settings}")
        place.take()
        (job,) = place.store.matching(f"cat{number}")
        prints.append(job.fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert job.record()["background"] == "#00ff7f"
    (request,) = clips(job, place.config.jobs_dir / job.id / INPUTS, place.config.lora_dir)
    assert request.background == "#00ff7f"
    assert open_picture(request.image, request.background)[0, 0].tolist() == [0, 255, 127]


def test_a_job_from_before_there_was_a_background_keeps_its_fingerprint_and_is_made(place: Place) -> None:
    place.drop()
    job = place.take()
    before = {key: value for key, value in job.settings.items() if key != "background"}
    assert resolve.fingerprint(job.inputs, before) == job.fingerprint
    job.settings = before
    assert Supervisor(place.config, place.store).work_of(job).request.background == "#ffffff"


@pytest.mark.parametrize("value", ['"white"', '"#fff"', '"ffffff"', '"#12345g"', "0xffffff", '["#ffffff"]'])
def test_a_background_that_is_no_colour_is_refused_with_what_it_may_be(place: Place, value: str) -> None:
    place.drop()
    (place.config.inbox / "cat.toml").write_text(f"background = {value}")
    job = place.take()
    assert job.delivery is not None
    assert 'cat.toml: background must be a colour as "#rrggbb"' in job.delivery["error"]


def test_colours_under_transparency_do_not_show_in_the_video(tmp_path: Path) -> None:
    """Start frame, end frame and keyframe alike."""
    encoded = []
    for number, hidden in enumerate(((200, 10, 10, 0), (3, 250, 99, 0))):
        folder = tmp_path / str(number)
        work = work_in(folder)
        for name in ("image", "end", "key"):
            picture = Image.new("RGBA", (48, 32), (40, 50, 60, 255))
            picture.paste(hidden, (0, 0, 24, 32))
            picture.save(folder / f"{name}.png")
        request = work.request.model_copy(
            update={"end_image": folder / "end.png", "keyframes": {0: folder / "key.png"}}
        )
        encoded.append(ENGINES.get(replace(work, request=request), 0).encode(request))
    one, other = encoded
    assert one.start_latents.equal(other.start_latents)
    assert one.image_embeds.equal(other.image_embeds)
    assert one.end_latents is not None
    assert other.end_latents is not None
    assert one.end_latents.equal(other.end_latents)
    assert one.keyframe_latents[0].equal(other.keyframe_latents[0])


def test_what_is_delivered_says_what_the_background_was(place: Place) -> None:
    place.make_ready()
    place.deliver()
    assert json.loads((place.config.outbox / "cat.json").read_text())["background"] == "#ffffff"
