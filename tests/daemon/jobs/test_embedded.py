"""A video says inside itself how it was made; beside its picture it is read as settings."""

import json
from pathlib import Path
from typing import Any

import av
import pytest

from framepackd import files
from framepackd.inbox.scan import Inbox
from framepackd.jobs.embedded import MAX_TITLE, read, settings_of
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker.messages import Finished
from tests.daemon.intake.studio import Studio, film

PROMPT = "A cat, who says:\n„Grüße“ – and\tgoes."


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "studio")


def tags_of(path: Path) -> dict[str, str]:
    with av.open(path) as container:
        return dict(container.metadata)


def test_the_mp4_says_how_it_was_made_and_nothing_about_the_job(studio: Studio, tmp_path: Path) -> None:
    studio.picture(prompt=PROMPT, seconds=1, seed=7, guidance_scale=6.5)
    studio.make()
    tags = tags_of(studio.outbox / "cat.mp4")
    assert tags["title"] == "A cat, who says: „Grüße“ – and goes."
    said = json.loads(tags["comment"])
    expected = {"made_by": "framepackd", "prompt": PROMPT, "model": "forward", "seed": 7}
    assert list(said.items())[:4] == list(expected.items())
    assert (said["guidance_scale"], said["width"], said["height"], said["crf"]) == (6.5, 48, 32, 16)
    assert said["model_sources"]["transformer"] == "framepack-f1", "of a folder of one's own its name alone"
    job = json.loads((studio.outbox / "cat.json").read_text())
    for told in (job["id"], str(tmp_path), job["finished_at"][:10]):
        assert told not in tags["comment"] + tags["title"]


def test_the_same_job_under_another_name_gives_the_same_bytes(studio: Studio, tmp_path: Path) -> None:
    other = Studio(tmp_path / "other")
    for place, name in ((studio, "cat"), (other, "katze")):
        place.picture(name, seconds=1, seed=7)
        place.make()
    assert (studio.outbox / "cat.mp4").read_bytes() == (other.outbox / "katze.mp4").read_bytes()


def test_without_embed_metadata_the_mp4_says_nothing_and_counts_as_the_same(studio: Studio) -> None:
    studio.picture(seconds=1, embed_metadata=False)
    job, _ = studio.make()
    assert not tags_of(studio.outbox / "cat.mp4").keys() & {"title", "comment"}
    studio.picture("dog", seconds=1)
    assert studio.take().fingerprint == job.fingerprint


def test_a_title_is_short(studio: Studio) -> None:
    studio.picture(prompt="long " * 1000, seconds=1)
    studio.make()
    assert len(tags_of(studio.outbox / "cat.mp4")["title"]) == MAX_TITLE


def test_a_video_dropped_with_its_picture_is_read_as_settings(studio: Studio) -> None:
    timed = [(0, 0.5, "it sits"), (0.5, 1, "it runs")]
    lines = (f"[[prompts]]\nfrom = {start}\nto = {end}\ntext = {text!r}\n" for start, end, text in timed)
    studio.picture(prompt=PROMPT, seconds=1, seed=7, true_cfg_scale=1.5, cache="magcache")
    with (studio.inbox / "cat.toml").open("a") as settings:
        settings.writelines(lines)
    first, answer = studio.make()
    assert isinstance(answer, Finished)
    sha = files.sha256(studio.outbox / "cat.mp4")
    studio.bring_back("cat.mp4", "cat.png")
    for path in studio.outbox.iterdir():
        path.unlink()
    job = studio.take()
    assert job.fingerprint == first.fingerprint
    assert job.settings == studio.store.get(first.id).settings
    assert job.inputs["recipe"] == {"file": "cat.mp4", "sha256": sha}


def test_name_toml_and_the_text_override_the_video_which_is_delivered_too(studio: Studio) -> None:
    studio.picture(prompt=PROMPT, seconds=1, seed=7, guidance_scale=6.5)
    studio.make()
    old = (studio.outbox / "cat.mp4").read_bytes()
    studio.bring_back("cat.mp4", "cat.png", "cat.json", "cat.latents.safetensors")
    for path in studio.outbox.iterdir():
        path.unlink()
    studio.settings(seed=8)
    (studio.inbox / "cat.txt").write_text("a dog")
    job, answer = studio.make()
    assert isinstance(answer, Finished)
    assert (job.settings["seed"], job.settings["prompt"], job.settings["guidance_scale"]) == (8, "a dog", 6.5)
    assert (studio.outbox / "cat.source.mp4").read_bytes() == old
    assert (studio.outbox / "cat.mp4").read_bytes() != old
    assert not list(studio.inbox.iterdir())


def test_another_programs_video_next_to_a_picture_blocks_nothing(studio: Studio) -> None:
    film(studio.inbox / "cat.mp4")
    studio.picture()
    (group,) = Inbox(studio.inbox, 0).scan().ready
    assert [Path(path).name for path in group.paths] == ["cat.png", "cat.txt", "cat.toml"]


def test_with_more_a_video_of_ours_is_extended(studio: Studio) -> None:
    studio.picture(seconds=1)
    studio.make()
    studio.bring_back("cat.mp4", "cat.png")
    studio.settings(more=1)
    (studio.inbox / "cat.txt").write_text("a cat")
    assert "video" in studio.take().inputs


def test_a_mistake_in_the_metadata_is_reported_with_the_file(studio: Studio) -> None:
    tags = {"comment": json.dumps({"made_by": "framepackd", "prompt": "a cat", "steps": 400})}
    with av.open(studio.inbox / "cat.mp4", "w") as container:
        container.metadata.update(tags)
        stream = container.add_stream("mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        container.mux(stream.encode(None))
    studio.picture()
    (studio.inbox / "cat.txt").unlink()
    told = studio.refusal()
    assert told.startswith("what cat.mp4 says of how it was made: steps must be 1 to 100, got 400")


@pytest.mark.parametrize(
    "comment",
    [None, "", "{", "[1]", '"framepackd"', '{"made_by": "another"}', "[" * 100_000, '{"prompt": "a cat"}'],
)
def test_comments_of_other_programs_are_ignored(comment: str | None) -> None:
    assert read(comment) is None


def test_only_known_settings_are_read() -> None:
    said: dict[str, Any] = {"seed": 7, "more": 3, "keyframes": {"0": "x.png"}, "seeds": 64, "later": 1}
    partial = {"file": "b.safetensors", "weight": 1.0, "allow_partial": True}
    entries = [{"file": "a.safetensors", "weight": 0.5, "sha256": "00"}, partial | {"matched": 3}]
    said |= {"loras": entries, "output": "/etc/passwd"}
    taken = settings_of(said, "cat.mp4")
    assert taken == {"seed": 7, "loras": [{"file": "a.safetensors", "weight": 0.5}, partial]}


def test_a_job_of_an_older_version_is_described_in_its_video_too(studio: Studio) -> None:
    studio.picture(seconds=1)
    job = studio.take()
    for key in ("embed_metadata", "prompts"):
        del job.settings[key]
    assert Supervisor(studio.config, studio.store).work_of(job).tags["title"] == "a cat"
