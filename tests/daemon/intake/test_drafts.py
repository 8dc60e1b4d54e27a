"""draft = true saves steps and cache, and nothing else; its final has the same seed; both name each other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.drafts import nearest
from framepackd.control.commands import Queue, perform
from framepackd.delivery import deliver as delivery
from framepackd.inbox.scan import Inbox
from framepackd.intake import take as intake
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import Job, State
from framepackd.worker.messages import Finished
from tests.core.models.loras import make_lora, stored
from tests.daemon.intake.studio import Studio, frames
from tests.daemon.place import at_every_call, undelivered

FULL = 4  # steps
TIMED = '[[prompts]]\nfrom = 0.0\nto = 0.4\ntext = "it jumps"\n'
SAME = ("seed", "width", "height", "frames", "sections", "prompt", "model", "crf", "guidance_scale", "loras")


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "studio", "backward")


def draft(studio: Studio, name: str = "cat", *, more: str = "", **settings: Any) -> Job:
    """Make a draft of two steps."""
    studio.config = studio.config.model_copy(
        update={"draft": studio.config.draft.model_copy(update={"steps": 2})}
    )
    studio.picture(name, draft=True, steps=FULL, seconds=1, **settings)
    with (studio.inbox / f"{name}.toml").open("a") as file:
        file.write(more + TIMED)
    job, reply = studio.make()
    assert isinstance(reply, Finished)
    return studio.store.get(job.id)


def record(studio: Studio, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((studio.outbox / f"{name}.json").read_text())
    return found


def final(studio: Studio, *wanted: str) -> list[str]:
    answer = perform({"command": "final", "jobs": wanted}, Queue(studio.config, studio.store))
    return [result["message"] for result in answer["results"]]


def queued(studio: Studio) -> Job:
    (job,) = studio.store.in_state(State.QUEUED)
    return job


def test_a_draft_saves_only_steps_and_cache_whatever_its_file_says_of_them(studio: Studio) -> None:
    job = draft(studio, seed=5, cache="teacache")
    studio.bring_back("cat.png", "cat.txt")
    (studio.inbox / "cat.toml").write_text(
        f'seed = 5\nseconds = 1\nsteps = {FULL}\ncache = "teacache"\n{TIMED}'
    )
    other = studio.take()
    assert (job.steps, job.settings["cache"]) == (2, "none")
    assert job.settings["final"] == {"steps": FULL, "cache": "teacache"}
    differing = {key for key in other.settings if job.settings[key] != other.settings[key]}
    assert differing == {"draft", "final", "steps", "cache"}
    assert (other.width, other.frames) == (job.width, job.frames)


def test_a_draft_takes_no_more_steps_than_its_final(studio: Studio) -> None:
    studio.picture(draft=True, steps=2)
    assert studio.take().steps == 2


@pytest.mark.parametrize(
    "moved",
    [
        ("cat.json", "cat.png"),
        ("cat.json", "cat.png", "cat.txt", "cat.toml"),
        ("cat.json", "cat.png", "cat.txt", "cat.toml", "cat.mp4"),
        ("cat.mp4", "cat.png", "cat.txt"),
    ],
    ids=["record", "dropped", "all", "video"],
)
def test_moving_a_drafts_files_back_makes_the_same_seed_with_all_steps(
    studio: Studio, moved: tuple[str, ...]
) -> None:
    made = draft(studio, seed="random")
    left = sorted(path.name for path in studio.outbox.iterdir() if path.name not in moved)
    before = {name: (studio.outbox / name).read_bytes() for name in left if name != "cat.json"}
    studio.bring_back(*moved)
    job, reply = studio.make()
    assert isinstance(reply, Finished)
    job = studio.store.get(job.id)
    assert (job.steps, job.settings["cache"], job.settings["draft"]) == (FULL, "none", False)
    assert {key: job.record()[key] for key in SAME} == {key: made.record()[key] for key in SAME}
    assert job.settings["prompts"] == made.settings["prompts"]
    assert {name: (studio.outbox / name).read_bytes() for name in before} == before, "nothing is overwritten"
    assert studio.waiting() == {}


def test_draft_and_final_name_each_other_in_their_records_and_in_show(studio: Studio) -> None:
    made = draft(studio)
    (said,) = final(studio, "cat")
    job = queued(studio)
    assert said == f"job {made.id} (cat): its final is job {job.id} (cat_final)"
    studio.end(job)
    assert record(studio, "cat_final")["draft_of"] == {"id": made.id, "steps": 2, "cache": "none"}
    output = str(studio.outbox / "cat_final.mp4")
    assert record(studio, "cat")["final"] == {"steps": FULL, "cache": "none", "id": job.id, "output": output}
    assert studio.store.get(made.id).settings["final"]["id"] == job.id


def test_the_final_takes_nothing_from_its_drafts_checkpoint_and_is_as_if_there_were_no_draft(
    studio: Studio, tmp_path: Path
) -> None:
    made = draft(studio, seed=9)
    final(studio, made.id)
    job = queued(studio)
    assert not (studio.config.jobs_dir / job.id / work_folder.CHECKPOINT).exists()
    assert job.fingerprint != made.fingerprint
    studio.end(job)
    alone = Studio(tmp_path / "alone", "backward")
    alone.picture(seed=9, steps=FULL)
    (alone.inbox / "cat.toml").write_text(f"seed = 9\nseconds = 1\nsteps = {FULL}\n{TIMED}")
    same, _ = alone.make()
    assert same.fingerprint == job.fingerprint
    assert (frames(alone.outbox / "cat.mp4") == frames(studio.outbox / "cat_final.mp4")).all()


def test_a_final_is_asked_for_once_and_only_of_a_draft(studio: Studio) -> None:
    made = draft(studio)
    final(studio, "cat")
    job = queued(studio)
    assert final(studio, "cat") == [f"job {made.id} (cat) has a final: job {job.id} (cat_final) is queued"]
    studio.end(job)
    assert final(studio, job.id) == [f"job {job.id} (cat_final) is no draft: it was made with all its steps"]


def test_a_final_whose_video_was_thrown_away_can_be_made_again(studio: Studio) -> None:
    draft(studio)
    final(studio, "cat")
    studio.end(queued(studio))
    (studio.outbox / "cat_final.mp4").unlink()
    (said,) = final(studio, "cat")
    assert f"its final is job {queued(studio).id}" in said


@pytest.mark.parametrize(("harm", "why"), [("removed", "is missing"), ("changed", "has changed since")])
def test_a_draft_whose_picture_is_not_as_it_was_cannot_be_made_final(
    studio: Studio, harm: str, why: str
) -> None:
    draft(studio)
    picture = studio.outbox / "cat.png"
    picture.unlink() if harm == "removed" else Image.new("RGB", (48, 32)).save(picture)
    (said,) = final(studio, "cat")
    assert f"{picture} {why}" in said
    assert not studio.store.in_state(State.QUEUED)


def test_chain_end_frame_and_keyframe_come_along(studio: Studio) -> None:
    studio.config = studio.config.model_copy(update={"defaults": studio.config.defaults | {"draft": True}})
    for name in ("walk_frame_0", "walk_frame_1", "walk_frame_2", "dog", "dog_end", "pose"):
        Image.new("RGB", (48, 32), f"#{len(name):02}4060").save(studio.inbox / f"{name}.png")
    for name in ("walk", "dog"):
        (studio.inbox / f"{name}.txt").write_text("it goes")
    studio.settings("walk", seconds=1)
    (studio.inbox / "dog.toml").write_text('seconds = 1.2\nkeyframes = { "1" = "pose.png" }\n')
    for group in Inbox(studio.inbox, 0).scan().ready:
        (job,) = intake.take(group, studio.config, studio.store)
        assert job.delivery is None, job.delivery
        studio.store.decide(job.id, State.DONE)
        (studio.config.jobs_dir / job.id / work_folder.RESULT).mkdir()
    for job in undelivered(studio.store):
        delivery.deliver(job, studio.config, studio.store)
    final(studio, "walk", "dog")
    walk, dog = studio.store.in_state(State.QUEUED)
    assert [role for role in walk.inputs if role.startswith("frame")] == ["frame-0", "frame-1", "frame-2"]
    assert dog.settings["keyframes"] == {"1": "dog_final_section_1.png"}
    assert "end" in dog.inputs
    assert (walk.clips, walk.settings["draft"], dog.settings["draft"]) == (2, False, False)


def test_the_final_of_a_longer_video_extends_the_same_video(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio")
    studio.picture(seconds=1)
    studio.make()
    studio.bring_back("cat.mp4", "cat.json", "cat.png", "cat.txt", "cat.latents.safetensors")
    studio.settings(more=1.0, draft=True, steps=3)
    studio.config = studio.config.model_copy(
        update={"draft": studio.config.draft.model_copy(update={"steps": 1})}
    )
    made, _ = studio.make()
    final(studio, made.id)
    job = queued(studio)
    assert job.delivery is None
    assert (job.steps, job.settings["more"], job.frames) == (3, 1.0, made.frames)
    assert job.inputs["video"]["sha256"] == made.inputs["video"]["sha256"]
    assert isinstance(studio.end(job), Finished)


def test_each_final_of_four_variations_has_the_seed_of_its_own_draft(studio: Studio) -> None:
    studio.picture(draft=True, seeds=4, seed=20, steps=FULL, seconds=1)
    (group,) = Inbox(studio.inbox, 0).scan().ready
    made = intake.take(group, studio.config, studio.store)
    for job in made:
        assert job.settings["draft"]
        studio.end(job)
    moved = made[2]
    studio.bring_back(*(f"{moved.name}{rest}" for rest in (".json", ".png", ".txt", ".toml")))
    again = studio.take()
    assert again.settings["seed"] == 22
    final(studio, *(job.name for job in made if job is not moved))
    finals = sorted(studio.store.in_state(State.QUEUED), key=lambda job: job.settings["seed"])
    assert [job.settings["seed"] for job in finals] == [20, 21, 22, 23]
    assert [job.settings["draft_of"]["id"] for job in finals] == [job.id for job in made]
    for job in finals:
        studio.end(job)
    shown = [frames(studio.outbox / f"{job.name}.mp4") for job in made]
    ends = [frames(Path(studio.store.get(job.id).output or "")) for job in finals]
    assert nearest(ends, shown) == [0, 1, 2, 3]


def test_a_final_has_the_lora_of_its_draft_with_its_weight(studio: Studio) -> None:
    studio.config.lora_dir.mkdir(exist_ok=True)
    spec = studio.config.spec("backward")
    make_lora(studio.config.lora_dir / "oil.safetensors", "kohya-hunyuan", stored(spec))
    made = draft(studio, more='[[loras]]\nfile = "oil.safetensors"\nweight = 0.5\n')
    (used,) = made.settings["loras"]
    final(studio, "cat")
    job = queued(studio)
    assert job.settings["loras"] == [used]
    assert used["weight"] == 0.5
    assert isinstance(studio.end(job), Finished)
    assert record(studio, "cat_final")["loras"] == record(studio, "cat")["loras"]
    studio.bring_back("cat.mp4", "cat.png")  # or by the video's own metadata
    assert studio.take().settings["loras"] == [used]


def test_a_final_that_cannot_be_made_is_a_failed_job_at_once_and_is_asked_for_again(studio: Studio) -> None:
    studio.config.lora_dir.mkdir(exist_ok=True)
    oil = studio.config.lora_dir / "oil.safetensors"
    make_lora(oil, "kohya-hunyuan", stored(studio.config.spec("backward")))
    made = draft(studio, more='[[loras]]\nfile = "oil.safetensors"\n')
    oil.rename(oil.with_suffix(".away"))
    (said,) = final(studio, "cat")
    assert said.startswith(f"job {made.id} (cat) cannot be made final: ")
    assert "there is no oil.safetensors" in said
    assert (studio.config.failed / "cat_final.error.txt").exists(), "no daemon runs that would put it there"
    oil.with_suffix(".away").rename(oil)
    final(studio, "cat")
    assert queued(studio).delivery is None


def test_whatever_call_a_final_dies_at_when_it_is_taken_in_it_is_made_once(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft(studio)
    tries = [Studio(shutil.copytree(tmp_path / "studio", tmp_path / "0"), "backward")]

    def ask_again() -> None:
        final(tries[-1], "cat")
        job = queued(tries[-1])
        assert job.path == "cat_final"
        assert [path.name for path in tries[-1].config.jobs_dir.iterdir()] == [job.id]
        tries.append(Studio(shutil.copytree(tmp_path / "studio", tmp_path / str(len(tries))), "backward"))

    def ask() -> None:
        final(tries[-1], "cat")

    assert at_every_call(monkeypatch, ask, ask_again) > 10


def test_a_record_that_still_arrives_holds_its_job_back(studio: Studio) -> None:
    made = draft(studio)
    studio.bring_back("cat.png", "cat.txt", "cat.json")
    half = (studio.inbox / "cat.json").read_text()[:100]
    whole = (studio.inbox / "cat.json").read_text()
    now = [0.0]
    inbox = Inbox(studio.inbox, 5, now=lambda: now[0])
    inbox.scan()
    now[0] = 4.0
    (studio.inbox / "cat.json").write_text(half)
    inbox.scan()
    now[0] = 6.0
    assert not inbox.scan().ready
    (studio.inbox / "cat.json").write_text(whole)
    inbox.scan()
    now[0] = 12.0
    (group,) = inbox.scan().ready
    (job,) = intake.take(group, studio.config, studio.store)
    assert job.settings["draft_of"]["id"] == made.id


def test_json_of_others_beside_a_picture_is_no_part_of_its_job(studio: Studio) -> None:
    studio.picture()
    (studio.inbox / "cat.json").write_text('{"prompt": "another", "seed": 1}')
    scan = Inbox(studio.inbox, 0).scan()
    assert [group.name for group in scan.ready] == ["cat"]
    assert [waits.name for waits in scan.waiting] == ["cat.json"]
