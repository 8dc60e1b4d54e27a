"""What is known of a job that fails at intake."""

from pathlib import Path

import pytest
from PIL import Image

from tests.daemon.place import Place

LATE_PROMPT = '[[prompts]]\nfrom = 7\nto = 8\ntext = "the cat runs"\n'


@pytest.mark.parametrize(
    ("wrong", "picture", "told"),
    [
        ('loras = [{file = "gone.safetensors", weight = 1.0}]\n', "", "gone.safetensors"),
        (LATE_PROMPT, "", "7"),
        ("", "cat_section_4.png", "for section 4"),
    ],
    ids=["LoRA", "timed prompt", "keyframe"],
)
def test_a_job_that_fails_late_at_intake_keeps_the_size_and_length_that_were_known(
    tmp_path: Path, wrong: str, picture: str, told: str
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    settings = "steps = 2\nseconds = 5\nwidth = 64\nheight = 96\n"
    (place.config.inbox / "cat.toml").write_text(settings + wrong)
    if picture:
        Image.new("RGB", (32, 32), "red").save(place.config.inbox / picture)
    failed = place.take()
    assert failed.delivery is not None
    assert failed.delivery["state"] == "failed"
    assert told in str(failed.delivery["error"])
    assert (failed.width, failed.height, failed.frames) == (64, 96, 145)
    assert (failed.sections, failed.steps_total) == (4, 8)
