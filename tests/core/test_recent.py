"""Texts and pictures of recent requests are not encoded again, and reused results are right."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framepack_core.conditioning import Recent
from framepack_core.engine import Engine
from framepack_core.request import Request
from tests.conftest import tiny_spec
from tests.core.requests import comparable

ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder", "vae.encoder")
ALL = {"text_encoder": 1, "text_encoder_2": 1, "image_encoder": 1, "vae.encoder": 1}


@pytest.fixture
def engine() -> Engine:
    return Engine.load(tiny_spec(), device="cpu")


@pytest.fixture
def calls(engine: Engine) -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    hooks = [
        getattr(engine.models, name.partition(".")[0])
        .get_submodule(name.partition(".")[2])
        .register_forward_hook(lambda *_, name=name: counted.update([name]))
        for name in ENCODERS
    ]
    yield counted
    for hook in hooks:
        hook.remove()


def picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def request_for(image: Path, **settings: object) -> Request:
    small = {"width": 48, "height": 32, "seconds": 1, "latent_window_size": 3}
    return Request.model_validate({"prompt": "a cat", **small, "image": image, **settings})


def test_the_same_prompt_and_picture_are_not_encoded_again(
    engine: Engine, calls: Counter[str], tmp_path: Path
) -> None:
    image = picture(tmp_path / "a.png")
    first = engine.encode(request_for(image))
    assert calls == ALL
    other = request_for(picture(tmp_path / "of-another-name.bmp"), steps=3)
    assert comparable(engine.encode(other)) == comparable(first)
    assert calls == ALL


def test_reused_results_are_those_that_a_new_engine_computes(engine: Engine, tmp_path: Path) -> None:
    image, end = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 1)
    everything = {"end_image": end, "keyframes": {0: end, 1: image}, "seed": 7}
    guided = {"negative_prompt": "blurry", "true_cfg_scale": 2.0, "prompt": "a dog"}
    engine.encode(request_for(image))
    engine.encode(request_for(end, prompt="blurry"))
    request = request_for(image, **everything, **guided)
    fresh = Engine.load(tiny_spec(), device="cpu").encode(request)
    assert comparable(engine.encode(request)) == comparable(fresh)
    assert comparable(engine.encode(request)) == comparable(fresh)


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        ({"prompt": "a dog"}, {"text_encoder", "text_encoder_2"}),
        ({"negative_prompt": "a cat", "true_cfg_scale": 2.0}, set()),
        ({"width": 32}, {"image_encoder", "vae.encoder"}),
        ({"seed": 1}, set()),
    ],
)
def test_only_what_differs_is_encoded(
    engine: Engine, calls: Counter[str], tmp_path: Path, change: dict[str, object], encoded: set[str]
) -> None:
    image = picture(tmp_path / "a.png")
    engine.encode(request_for(image))
    calls.clear()
    engine.encode(request_for(image, **change))
    assert set(calls) == encoded


def test_another_seed_draws_other_latents_of_the_same_picture(engine: Engine, tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    one, other = (engine.encode(request_for(image, seed=seed)).start_latents for seed in (1, 2))
    assert not torch.equal(one, other)


def test_a_picture_that_was_replaced_is_encoded(engine: Engine, calls: Counter[str], tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    engine.encode(request_for(image))
    picture(image, seed=1)
    engine.encode(request_for(image))
    assert (calls["image_encoder"], calls["vae.encoder"], calls["text_encoder"]) == (2, 2, 1)


def test_the_least_recently_used_result_is_dropped() -> None:
    made: list[str] = []
    recent = Recent[str](2)

    def get(*names: str) -> list[str]:
        def make(sources: list[str]) -> list[str]:
            made.extend(sources)
            return [source.upper() for source in sources]

        return recent.all({name: name for name in names}, make)

    assert [get("a"), get("b"), get("a"), get("c"), get("a")] == [["A"], ["B"], ["A"], ["C"], ["A"]]
    assert made == ["a", "b", "c"]
    assert get("d", "b", "c", "a") == ["D", "B", "C", "A"], "more at once than are kept"
    assert made == ["a", "b", "c", "d", "b"]


def test_a_failed_encoder_leaves_nothing_behind() -> None:
    recent = Recent[str]()

    def fail(_: list[str]) -> list[str]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        recent.all({"a": "a"}, fail)
    assert recent.all({"a": "a"}, lambda sources: sources) == ["a"]
