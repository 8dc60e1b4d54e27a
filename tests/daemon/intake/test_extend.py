"""A video dropped with `more` becomes longer: what belongs to it, what is refused, what comes out."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from framepack_core.errors import RequestError
from framepack_core.media import extend, segments, video_colours
from framepack_core.media.pictures import crop_to
from framepackd.delivery import deliver as delivery
from framepackd.inbox.scan import Inbox
from framepackd.intake import take as intake
from framepackd.intake import take_back
from framepackd.intake.extend import MAX_RECORD_BYTES, SourceRecord, read_record
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import State
from framepackd.supervisor import readiness
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker import source_video
from framepackd.worker.main import answer
from framepackd.worker.messages import Finished, Message, Resumed, StepDone
from framepackd.worker.source_video import OLD, Continued
from tests.daemon.intake.studio import ENGINES, SECTION, Studio, film, frames
from tests.daemon.place import undelivered
from tests.daemon.worker.jobs import Ears

DELIVERED = ("cat.mp4", "cat.json", "cat.png", "cat.txt", "cat.latents.safetensors")


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "studio")


def latents(path: Path) -> torch.Tensor:
    return safetensors.torch.load_file(path)["latents"]


def packets(path: Path) -> list[bytes]:
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def made_ready(studio: Studio) -> Continued:
    """Take a video in and make it ready in this process, where what is patched holds."""
    job = studio.take()
    continued = Supervisor(studio.config, studio.store).work_of(job).continued
    assert continued is not None
    Path(continued.folder).mkdir()
    source_video.split(continued)
    return continued


def test_extended_from_its_latents_a_video_is_what_it_would_have_been(studio: Studio, tmp_path: Path) -> None:
    other = Studio(tmp_path / "other")
    other.picture(seconds=5 * SECTION, seed=7)
    assert isinstance(other.make()[1], Finished)
    studio.picture(seconds=3 * SECTION, seed=7)
    studio.make()
    short = studio.outbox / "cat.mp4"
    before, sha = packets(short), intake.files.sha256(short)
    studio.bring_back(*DELIVERED)
    (studio.outbox / "cat.toml").unlink()
    studio.settings(more=1)
    job, answer = studio.make()
    assert isinstance(answer, Finished)
    long = other.outbox / "cat.mp4"
    assert torch.equal(
        latents(studio.outbox / "cat.latents.safetensors"), latents(other.outbox / "cat.latents.safetensors")
    )
    assert frames(short).shape == frames(long).shape == (61, 32, 48, 3)
    assert difference(frames(short), frames(long)) < 2, "encoded in other pieces"
    # Up to the last section of the old video not one packet is another: encoded once, and copied.
    copied = 61 - 24 - extend.remade(10, 3)
    assert packets(short)[:copied] == packets(long)[:copied] == before[:copied]
    record = json.loads((studio.outbox / "cat.json").read_text())
    went_on = {"file": "cat.mp4", "sha256": sha, "frames": 37, "latents": 10, "encoded_anew": False}
    assert record["continues"] == went_on
    assert (record["frames"], record["sections"], record["prompt"], record["seed"]) == (61, 2, "a cat", 7)
    assert intake.files.sha256(studio.outbox / "cat.source.mp4") == sha, "the old one is not lost"
    assert sorted(path.name for path in studio.outbox.iterdir()) == [
        "cat.json",
        "cat.latents.safetensors",
        "cat.mp4",
        "cat.png",
        "cat.source.json",
        "cat.source.latents.safetensors",
        "cat.source.mp4",
        "cat.toml",
        "cat.txt",
    ]
    assert not list(studio.inbox.iterdir())
    assert job.steps_total == 4


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize(("rate", "count", "expected"), [(30, 40, 40), (25, 20, 24), (30, 1, 1)])
def test_another_programs_video_is_extended_from_its_last_frames(
    studio: Studio, rate: int, count: int, expected: int
) -> None:
    shown = film(studio.inbox / "dog.mp4", count, rate=rate)
    assert len(shown) == expected
    (studio.inbox / "dog.txt").write_text("a dog")
    studio.settings("dog", more=1)
    _, answer = studio.make()
    assert isinstance(answer, Finished)
    made = frames(studio.outbox / "dog.mp4")
    assert made.shape == (expected + 2 * 12, 32, 48, 3)
    # The old part is as it was, scaled; what fades in begins behind it, and no frame comes twice.
    scaled = [crop_to(frame, (32, 48)) for frame in shown]
    untouched = expected - extend.frames_of(min(extend.tail_latents(expected), 3)) + 1
    for number in range(untouched):
        near = [difference(made[number], frame) for frame in scaled]
        assert near[number] < 4, "sharp edges between bright colours, whose chroma is halved once more"
        assert near[number] < min(near) + 0.1, "at 25 a second some are shown twice"
    record = json.loads((studio.outbox / "dog.json").read_text())
    assert record["continues"]["latents"] is None
    assert record["continues"]["encoded_anew"] is (untouched > 1)
    assert sorted(path.name for path in studio.outbox.iterdir()) == [
        "dog.json",
        "dog.latents.safetensors",
        "dog.mp4",
        "dog.source.mp4",
        "dog.toml",
        "dog.txt",
    ]


def test_one_of_our_own_without_latents_is_not_encoded_again(studio: Studio) -> None:
    studio.picture(seconds=5 * SECTION)
    studio.make()
    before = packets(studio.outbox / "cat.mp4")
    studio.bring_back("cat.mp4", "cat.json")
    for other in studio.outbox.iterdir():
        other.unlink()
    studio.settings(more=1)
    _, answer = studio.make()
    assert isinstance(answer, Finished)
    kept = 61 - extend.remade(extend.tail_latents(61), 3)
    assert packets(studio.outbox / "cat.mp4")[:kept] == before[:kept]
    assert kept == 40, "where the last but one of its pieces ends"


@pytest.mark.parametrize("known_by", ["its options", "its record"])
def test_a_video_of_an_older_version_is_encoded_again_in_its_own_colours(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, known_by: str
) -> None:
    """It says nothing of them; from 720 lines up a video of anybody else's would be taken for BT.709."""
    if known_by == "its record":
        before = film(studio.inbox / "cat.mp4", 61, (32, 48))
        (studio.inbox / "cat.json").write_text('{"seed": 7}')
    else:
        before = np.full((61, 32, 48, 3), (40, 200, 120), np.uint8)
        old = segments.encode(before, size=(32, 48), crf=16, colours="bt601")
        segments.join(studio.inbox / "cat.mp4", [old])
    (studio.inbox / "cat.txt").write_text("a cat")
    studio.settings(more=1)
    monkeypatch.setattr(video_colours, "HD_LINES", 32)  # as many as these videos have
    ready = made_ready(studio)
    assert ready.encoded_anew()
    assert segments.colours_of(ready.old()) == "bt709"
    assert difference(frames(Path(ready.folder) / OLD), before[: ready.stays]) < 4
    assert ready.stays > 0


def test_a_video_that_an_older_version_was_extending_keeps_its_colours(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = film(studio.inbox / "dog.mp4")
    (studio.inbox / "dog.txt").write_text("a dog")
    studio.settings("dog", more=1)
    with monkeypatch.context() as older:
        older.setattr(segments, "encode", partial(segments.encode, colours="bt601"))
        ready = made_ready(studio)
    job = studio.store.matching("dog")[0]
    assert isinstance(studio.end(job), Finished)
    assert segments.colours_of((studio.outbox / "dog.mp4").read_bytes()) == "bt601"
    made = frames(studio.outbox / "dog.mp4")[: ready.stays]
    assert len(made) > 10
    assert difference(made, np.stack([crop_to(frame, (32, 48)) for frame in shown[: ready.stays]])) < 4


def test_the_whole_set_may_be_dropped_again_and_again(studio: Studio) -> None:
    studio.picture(seconds=1)
    studio.make()
    length = 25
    for _ in range(2):
        studio.settings(more=1)
        (studio.outbox / "cat.toml").unlink()
        studio.bring_back(*DELIVERED)
        for old in studio.outbox.iterdir():
            old.unlink()
        _, answer = studio.make()
        assert isinstance(answer, Finished)
        length += 24
        assert len(frames(studio.outbox / "cat.mp4")) == length
        assert extend.latents_shape(studio.outbox / "cat.latents.safetensors")[0] == (length - 1) // 4 + 1


def test_an_interrupted_extension_resumes_and_gives_the_same_bytes(studio: Studio, tmp_path: Path) -> None:
    results = []
    for steps_before_the_end in (None, 0, 1, 3):
        root = Studio(tmp_path / str(steps_before_the_end))
        film(root.inbox / "dog.mp4")
        film_size = (root.inbox / "dog.mp4").stat().st_size
        (root.inbox / "dog.txt").write_text("a dog")
        root.settings("dog", more=1)
        job = root.take()
        root.store.claim()
        work = Supervisor(root.config, root.store).work_of(job)
        if steps_before_the_end is not None:
            ears = Ears()
            stopping = Stopping(ears.theirs, steps_before_the_end)
            with pytest.raises(KeyboardInterrupt):
                answer(work, ENGINES, stopping)  # type: ignore[arg-type]  # as far as it is used
        ears = Ears()
        assert isinstance(answer(work, ENGINES, ears.theirs), Finished)
        used = sum(path.stat().st_size for path in work.result.parent.rglob("*") if path.is_file())
        assert used - film_size < sum(readiness.needed(job).values())
        results.append(
            ((work.result / ".mp4").read_bytes(), (work.result / ".latents.safetensors").read_bytes())
        )
    assert results[1:] == results[:1] * 3


def test_with_damaged_latents_it_resumes_from_earlier_sections_and_gives_the_same_bytes(
    studio: Studio,
) -> None:
    film(studio.inbox / "dog.mp4")
    (studio.inbox / "dog.txt").write_text("a dog")
    studio.settings("dog", more=1)
    job = studio.take()
    work = Supervisor(studio.config, studio.store).work_of(job)
    results = []
    for _ in range(2):
        ears = Ears()
        assert isinstance(answer(work, ENGINES, ears.theirs), Finished)
        results.append((work.result / ".mp4").read_bytes())
        (work.checkpoint / "latents-0001").write_bytes(b"damaged")
    assert Resumed(job.steps) in ears.heard()
    assert results[0] == results[1]


class Stopping:
    """A connection on which the power goes after some steps."""

    def __init__(self, connection: Any, steps: int) -> None:
        self._connection, self._steps = connection, steps

    def send(self, message: Message) -> None:
        if isinstance(message, StepDone):
            if not self._steps:
                raise KeyboardInterrupt
            self._steps -= 1
        self._connection.send(message)

    def poll(self) -> bool:
        return False


def test_what_belongs_together_and_what_waits_for_what(studio: Studio) -> None:
    for name in ("cat.mp4", "cat.json", "cat.latents.safetensors"):
        (studio.inbox / name).write_text("{}")
    assert studio.waiting() == {"cat": "more = 3.0 in cat.toml, to make cat.mp4 longer by so many seconds"}
    (studio.inbox / "cat.mp4").unlink()
    assert set(studio.waiting()) == {"cat.json", "cat.latents.safetensors"}, "nothing that they belong to"
    studio.picture(more=3.0)
    assert studio.waiting()["cat"] == "cat.mp4"
    (studio.inbox / "cat.mp4").touch()
    (group,) = Inbox(studio.inbox, 0).scan().ready
    assert sorted(group.roles) == ["image", "latents", "record", "settings", "text", "video"]


def test_a_video_next_to_a_picture_blocks_nothing(studio: Studio) -> None:
    studio.picture(seconds=1)
    (studio.inbox / "cat.mp4").touch()
    assert studio.waiting() == {"cat": "more = 3.0 in cat.toml, to make cat.mp4 longer by so many seconds"}
    studio.take()
    assert [path.name for path in studio.inbox.iterdir()] == ["cat.mp4"]


def test_more_in_a_folders_defaults_extends_its_videos_and_not_its_pictures(studio: Studio) -> None:
    film(studio.inbox / "dog.mp4")
    (studio.inbox / "_defaults.toml").write_text('more = 1\nprompt = "it runs"\n')
    studio.picture(seconds=1)
    ready = {group.name: group for group in Inbox(studio.inbox, 0).scan().ready}
    jobs = {name: intake.take(group, studio.config, studio.store)[0] for name, group in ready.items()}
    assert (jobs["dog"].frames, jobs["dog"].settings["more"]) == (40 + 24, 1)
    assert (jobs["cat"].frames, jobs["cat"].settings["more"]) == (25, None)


def test_timed_prompts_count_from_the_start_of_the_whole_video(studio: Studio) -> None:
    film(studio.inbox / "dog.mp4", 61)
    (studio.inbox / "dog.toml").write_text(
        'prompt = "a dog"\nmore = 1\n[[prompts]]\nfrom = 2.4\nto = 3\ntext = "it lies down"\n'
    )
    job = studio.take()
    assert job.record()["prompts"][0]["sections"] == [1]
    (timed,) = Supervisor(studio.config, studio.store).work_of(job).request.prompts
    assert (round(timed.start, 6), round(timed.end, 6)) == (0.4, 1.0)


BACKWARD = (
    "model backward generates backward and cannot extend a video: "
    "use a model of kind f1 (demo-f1, f1, forward)"
)


def test_extending_uses_a_model_that_generates_forward(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio", model="backward")
    for settings in ({}, {"model": "forward"}):
        film(studio.inbox / "dog.mp4")
        studio.settings("dog", more=1, prompt="a dog", **settings)
        assert studio.take().settings["model"] == "forward"
    film(studio.inbox / "dog.mp4")
    studio.settings("dog", more=1, prompt="a dog", model="backward")
    assert studio.refusal() == BACKWARD
    studio.config = studio.config.model_copy(
        update={"models": {"backward": studio.config.models["backward"]}}
    )
    film(studio.inbox / "dog.mp4")
    studio.settings("dog", more=1, prompt="a dog")
    told = studio.refusal()
    assert told.startswith(
        "extending needs a model of kind f1, and backward is of kind framepack: run framepackd"
    )


@pytest.mark.parametrize(
    "way", ["empty", "text", "playlist", "cut", "of another size", "of a longer video", "nan"]
)
def test_a_video_that_cannot_be_extended_fails_and_comes_back_under_its_name(
    studio: Studio, way: str
) -> None:
    video, kept = studio.inbox / "dog.mp4", studio.inbox / "dog.latents.safetensors"
    film(video)
    studio.settings("dog", more=1, prompt="a dog")
    told = "dog.mp4 cannot be read as mp4"
    if way == "empty":
        video.write_bytes(b"")
    elif way == "text":
        video.write_text("not a video")
    elif way == "playlist":
        video.write_text(f"#EXTM3U\n#EXTINF:1,\n{studio.config.database}\n")
    elif way == "cut":
        video.write_bytes(video.read_bytes()[:3000])
    else:
        rows, count = (6, 5) if way == "of another size" else (8, 40 if "longer" in way else 5)
        content = torch.zeros(1, 16, count, rows, 12)
        if way == "nan":
            content[0, 0, 0, 0, 0] = torch.nan
        safetensors.torch.save_file({"latents": content}, kept)
        told = "dog.latents.safetensors is of" if way != "nan" else "holds numbers that are not finite"
    if way != "nan":
        assert told in studio.refusal()
        delivery.deliver(undelivered(studio.store)[0], studio.config, studio.store)
    else:
        assert told in getattr(studio.make()[1], "error", "")
    delivered = {path.name for path in studio.config.failed.iterdir()}
    assert {"dog.mp4", "dog.toml", "dog.error.txt"} <= delivered, "to be put right and dropped again"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "dog.json is not JSON"),
        ("[" * 100_000, "dog.json is not JSON"),
        ("[1]", "dog.json is not what is delivered beside a video"),
        ("9" * 5000, "dog.json is not JSON"),
        (" " * (MAX_RECORD_BYTES + 1), "dog.json has more than"),
        ('{"steps": 1000}', "dog.json: steps must be 1 to 100, got 1000"),
        ('{"seed": "yes"}', "dog.json: seed must be"),
        ('{"seed": 1e999}', "dog.json: seed"),
    ],
)
def test_a_record_is_not_trusted(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "dog.json").write_text(content)
    with pytest.raises(RequestError, match=told):
        read_record(tmp_path / "dog.json")


def test_only_known_keys_of_a_record_are_used(tmp_path: Path) -> None:
    said = {
        "more": 5,
        "seconds": 9,
        "prompts": [1],
        "model": ["x"],
        "inputs": 3,
        "model_sources": "x",
        "id": {},
    }
    (tmp_path / "dog.json").write_text(json.dumps({**said, "prompt": "a dog", "crf": 20, "width": None}))
    assert read_record(tmp_path / "dog.json") == SourceRecord({"prompt": "a dog", "crf": 20})


def test_the_end_frame_of_the_old_video_does_not_hinder_and_a_new_one_is_refused(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio", model="backward")
    studio.picture(seconds=1)
    shutil.copy(studio.inbox / "cat.png", studio.inbox / "cat_end.png")
    studio.make()
    names = [path.name for path in studio.outbox.iterdir() if path.suffix != ".toml"]
    for name in names:
        shutil.copy(studio.outbox / name, studio.inbox / name)
    studio.settings(more=1)
    job, answer = studio.make()
    assert isinstance(answer, Finished)
    assert job.settings["model"] == "forward"
    for name in names:
        shutil.copy(studio.outbox / name, studio.inbox / name)
    Image.new("RGB", (48, 32)).save(studio.inbox / "cat_end.png")
    studio.settings(more=1)
    assert "cannot aim at an end frame" in studio.refusal()


def test_a_job_cancelled_with_keep_delivers_both_videos_and_can_be_retried(studio: Studio) -> None:
    film(studio.inbox / "dog.mp4")
    studio.settings("dog", more=1, prompt="a dog")
    job = studio.take()
    studio.store.claim()
    work = Supervisor(studio.config, studio.store).work_of(job)
    ears = Ears()
    with pytest.raises(KeyboardInterrupt):
        answer(work, ENGINES, Stopping(ears.theirs, 3))  # type: ignore[arg-type]  # as far as it is used
    studio.store.cancel(job.id, "keep")
    ears = Ears()
    assert isinstance(answer(replace(work, keep_only=True), ENGINES, ears.theirs), Finished)
    studio.store.decide(job.id, State.DONE)
    delivery.deliver(studio.store.get(job.id), studio.config, studio.store)
    failed = studio.config.failed
    assert len(frames(failed / "dog.mp4")) == 40 + 12
    assert len(frames(failed / "dog.source.mp4")) == 40
    assert take_back.obstacle(studio.store.get(job.id), studio.config) is None
    studio.store.retry(job.id)
    take_back.bring_back(studio.store.get(job.id), studio.config, studio.store)
    assert studio.store.get(job.id).delivery is None
    assert len(frames(studio.config.jobs_dir / job.id / work_folder.INPUTS / "dog.mp4")) == 40
