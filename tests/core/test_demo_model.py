"""The bundled model moves a picture that it was never trained on as the text says."""

import random
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

from framepack_core.engine import Engine
from framepack_core.models.registry import BUILT_IN
from framepack_core.sections import Kind
from training.crops import centre
from training.evaluate import engine_for, make, nearest, truths
from training.motions import MOTIONS, OTHERWISE, render
from training.paraphrases import PARAPHRASES
from training.pictures import to_tensor
from training.prompts import FILLERS, PHRASES, draw
from training.run import psnr
from training.text import stand_in_for_unknown_words

SIZE = 128
LAST = slice(25, 37)  # the last third of a section


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    with Image.open(Path(str(files("framepackd") / "demo/lake.png"))) as lake:
        return centre(to_tensor(lake), SIZE)


@cache
def engine(kind: Kind) -> Engine:
    folder = BUILT_IN["demo"].transformer.folder
    assert folder is not None
    return engine_for(folder.parent, kind)


@pytest.mark.parametrize("kind", ["framepack", "f1"])
def test_a_pan_is_nearer_to_itself_than_to_a_still_and_the_other_way(
    picture: torch.Tensor, kind: Kind
) -> None:
    made = make(engine(kind), picture, "The camera pans to the left.", 1)[LAST]
    times = torch.arange(37)[LAST]
    right_one, other = (psnr(made, render(picture, motion, times)) for motion in ("pan left", "pan right"))
    assert right_one > psnr(picture.expand_as(made), render(picture, "pan left", times)) + 3
    assert right_one > other + 3


@pytest.mark.parametrize(
    ("prompt", "motion"),
    [
        ("The camera moves closer", "zoom in"),
        ("mist rises", "fog"),
        pytest.param("look up", "tilt up", marks=pytest.mark.long),
        pytest.param("spin left", "rotate left", marks=pytest.mark.long),
        pytest.param("the water ripples", "ripple", marks=pytest.mark.long),
    ],
)
def test_the_requested_motion_is_nearest_of_all_motions(
    picture: torch.Tensor, prompt: str, motion: str
) -> None:
    made = make(engine("f1"), picture, prompt, 1)
    assert nearest(made, truths(picture, 37), LAST) == motion


def test_night_falls(picture: torch.Tensor) -> None:
    made = make(engine("f1"), picture, "Night falls", 1)
    brightness = ((made + 1) / 2).mean((1, 2, 3))
    assert brightness[36] < 0.6 * brightness[0]
    assert psnr(made[LAST], render(picture, "night falls", torch.arange(37)[LAST])) > 20


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "猫が歩いている",
        pytest.param("The knight draws his sword", marks=pytest.mark.long),
        pytest.param("le chat dort", marks=pytest.mark.long),
    ],
)
def test_unknown_words_make_the_picture_sway_or_stand_still(picture: torch.Tensor, prompt: str) -> None:
    made = make(engine("f1"), picture, prompt, 1)
    assert nearest(made, truths(picture, 37), LAST) in (OTHERWISE, "still")


def test_one_word_replaces_each_unknown_word_and_no_other() -> None:
    tokenizer = engine("f1").models.tokenizer
    normalizer = tokenizer.backend_tokenizer.normalizer
    assert str(normalizer) == str(stand_in_for_unknown_words())
    assert normalizer.normalize_str("A samurai Zooming in; don't stop") == "A cat Zooming in; cat't cat"
    slots = re.compile(r"\{.*?\}")
    known = [slots.sub(" ", text) for texts in (*PHRASES.values(), *FILLERS.values()) for text in texts]
    assert [normalizer.normalize_str(text) for text in known] == known


def test_the_same_seed_gives_the_same_frames(picture: torch.Tensor) -> None:
    small = centre(((picture + 1) * 127.5).to(torch.uint8), 64)
    one, other = (make(engine("f1"), small, "zoom in", 1, steps=2) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("motion", [*MOTIONS, None])
def test_training_and_test_sentences_are_disjoint(motion: str | None) -> None:
    by = random.Random(0)
    drawn = {" ".join(re.findall(r"\w+", draw(motion, by).lower())) for _ in range(5000)}
    measured = {
        " ".join(re.findall(r"\w+", text.lower())) for texts in PARAPHRASES.values() for text in texts
    }
    assert min(map(len, drawn | measured)) > 1  # letters of a sentence are none
    assert not drawn & measured
    assert len(drawn) > 1000 if motion else drawn
