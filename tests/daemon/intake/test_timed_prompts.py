"""Timed prompts from the TOML file to the worker and to NAME.json."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from framepack_core.sections import sections_of
from framepackd.cli import page_of_job
from framepackd.delivery.deliver import final_record
from framepackd.intake import resolve
from framepackd.jobs.job import Job
from framepackd.supervisor.supervisor import Supervisor
from tests.daemon.intake.taken import taken
from tests.daemon.place import Place

TWO = """
seconds = 5
[[prompts]]
from = 0
to = 2.4
text = "the cat sits"
[[prompts]]
from = 3.6
to = 5
text = "the cat runs"
"""


def told(job: Job) -> list[Any]:
    return [
        (timed["from"], timed["to"], timed["text"], timed["sections"]) for timed in job.record()["prompts"]
    ]


def test_the_record_lists_the_sections_of_each_prompt_in_the_order_of_generation(
    tmp_path: Path,
) -> None:
    place, backward = taken(tmp_path / "backward", TWO)
    assert told(backward) == [(0, 2.4, "the cat sits", [2, 3]), (3.6, 5, "the cat runs", [0])]
    backward.delivery = {"state": "done", "error": None}
    assert json.loads(json.dumps(final_record(backward)))["prompts"] == backward.record()["prompts"]
    forward = taken(tmp_path / "forward", TWO, "f1")[1]
    assert told(forward) == [(0, 2.4, "the cat sits", [0, 1]), (3.6, 5, "the cat runs", [3])]
    request = Supervisor(place.config, place.store).work_of(backward).request
    assert [(timed.start, timed.end, timed.text) for timed in request.prompts] == [
        (0, 2.4, "the cat sits"),
        (3.6, 5, "the cat runs"),
    ]


def test_show_lists_timed_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, job = taken(tmp_path / "place", TWO)
    console = Console(width=200)
    console.print(page_of_job.page(job.record(), datetime.now(UTC)))
    shown = capsys.readouterr().out
    assert "the cat sits (0 to 2.4 s, section 2, 3)" in shown


def test_a_text_file_is_the_prompt_verbatim_and_no_times_are_read_out_of_it(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    (place.config.inbox / "cat.txt").write_text("[0s-2s: the cat sits] [[prompts]] from = 0")
    place.take()
    (job,) = place.store.matching("cat")
    assert job.settings["prompt"] == "[0s-2s: the cat sits] [[prompts]] from = 0"
    assert job.settings["prompts"] == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (TWO.replace("to = 5", "to = 7"), "from = 3.6, to = 7 ends after the video, which has 4.83 s"),
        (
            TWO.replace("3.6", "2"),
            "cat.toml: prompts hold from = 0, to = 2.4 and from = 2, to = 5, which overlap",
        ),
        (TWO.replace("to = 5", "to = 3.7"), "from = 3.6, to = 3.7 acts in no section"),
    ],
)
def test_impossible_times_fail_at_intake(tmp_path: Path, settings: str, told: str) -> None:
    _, job = taken(tmp_path / "place", settings)
    assert job.delivery is not None
    assert told in job.delivery["error"]


def test_an_empty_list_removes_a_folders_timed_prompts(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    (place.config.inbox / "_defaults.toml").write_text(TWO)
    (place.config.inbox / "cat.toml").write_text("prompts = []")
    place.take()
    (job,) = place.store.matching("cat")
    assert job.record()["prompts"] == []


def test_a_job_without_them_is_recognised_as_one_from_before_there_were_any(tmp_path: Path) -> None:
    """Its fingerprint finds earlier results, and its row has no such key."""
    place, job = taken(tmp_path / "with", "prompts = []")
    before = {key: value for key, value in job.settings.items() if key != "prompts"}
    assert resolve.fingerprint(job.inputs, before) == job.fingerprint
    job.settings = before
    assert Supervisor(place.config, place.store).work_of(job).request.prompts == ()


def test_in_a_chain_times_and_sections_count_over_all_clips(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    for number in range(3):
        Image.new("RGB", (32, 32), (90 * number, 0, 0)).save(place.config.inbox / f"dog_frame_{number}.png")
    (place.config.inbox / "dog.toml").write_text(
        'prompt = "a dog"\nseconds = 2.4\n'  # two clips of two sections
        '[[prompts]]\nfrom = 1.2\nto = 3.6\ntext = "it turns"\n'
        '[[prompts]]\nfrom = 3.6\nto = 4.8\ntext = "it sits"\n'
    )
    place.take()
    (job,) = place.store.matching("dog")
    assert told(job) == [(1.2, 3.6, "it turns", [0, 3]), (3.6, 4.8, "it sits", [2])]
    work = Supervisor(place.config, place.store).work_of(job)
    spans = [
        [(round(timed.start, 6), round(timed.end, 6), timed.text) for timed in clip.prompts]
        for clip in work.clips
    ]
    assert spans[0] == [(1.2, pytest.approx(2.4, abs=0.04), "it turns")]
    assert spans[1] == [(0, 1.2, "it turns"), (1.2, 2.4, "it sits")]
    for clip, sections in zip(work.clips, ([[0]], [[1], [0]]), strict=True):
        assert sections_of(clip.prompts, "framepack", 2, 9, asked=clip.seconds) == sections
