"""Timed prompts: each section takes the one in whose span its middle lies."""

import contextlib
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from framepack_core.engine import Clip, Engine, Step
from framepack_core.errors import RequestError
from framepack_core.mistakes import explain
from framepack_core.request import Request, TimedPrompt
from framepack_core.sections import frame_count, section_count, sections_of
from tests.core.requests import GUIDED, everything, request_for

TinyEngine = Callable[[str], Engine]
KINDS = ("framepack-i2v", "framepack-f1")


def timed(start: float, end: float, text: str = "a dog") -> dict[str, Any]:
    return {"from": start, "to": end, "text": text}


def acting(
    spans: list[tuple[float, float]], kind: Any = "f1", sections: int = 4, **more: Any
) -> list[list[int]]:
    prompts = [TimedPrompt.model_validate(timed(*span)) for span in spans]
    return sections_of(prompts, kind, sections, 9, **more)


def test_sections_are_listed_in_generation_order() -> None:
    assert acting([(0, 2.4), (2.4, 4.8)]) == [[0, 1], [2, 3]]
    assert acting([(0, 2.4), (2.4, 4.8)], "framepack") == [[2, 3], [0, 1]]
    assert acting([(3.6, 4.8), (0, 1.2)], "framepack") == [[0], [3]], "in any order"


def test_from_is_included_and_to_is_not() -> None:
    assert acting([(0.6, 1.8)]) == [[0]]
    assert acting([(0.61, 1.81)]) == [[1]]


def test_to_may_be_the_requested_length_although_the_video_is_shorter() -> None:
    assert acting([(3.6, 5.0)], asked=5.0) == [[3]]
    with pytest.raises(RequestError, match=r"to = 5.1 ends after the video, which has 4.83 s"):
        acting([(3.6, 5.1)], asked=5.0)


def test_times_begin_with_the_video_that_is_extended() -> None:
    assert acting([(4.8, 6.1)], before=4.8, sections=2) == [[0]]
    with pytest.raises(
        RequestError, match=r"from = 0, to = 3 acts in no section: sections of 1\.20 s are made from 4\.80"
    ):
        acting([(0, 3)], before=4.8, sections=2)


def test_a_prompt_that_acts_in_no_section_is_refused_and_the_middles_are_listed() -> None:
    with pytest.raises(
        RequestError, match=r"from = 0, to = 0.5 acts in no section.*0.60, 1.80, 3.00, 4.20 s"
    ):
        acting([(0, 0.5)])


@given(
    st.sampled_from(["framepack", "f1"]),
    st.integers(1, 33),
    st.floats(1, 120),
    st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True),
)
def test_adjacent_spans_share_all_sections(kind: Any, window: int, seconds: float, cuts: list[float]) -> None:
    sections = section_count(seconds, window)
    length = frame_count(sections, window) / 30
    edges = [0, *sorted(cut * length for cut in cuts), length]
    found: list[int] = []
    for start, end in pairwise(edges):
        prompt = TimedPrompt.model_construct(start=start, end=end, text="x")
        with contextlib.suppress(RequestError):  # between two middles
            found += sections_of([prompt], kind, sections, window)[0]
    assert sorted(found) == list(range(sections)), "every section is one prompt's"


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([timed(3, 1)], "from = 3, to = 1, where 'to' must be greater than 'from'"),
        ([timed(1, 1)], "from = 1, to = 1, where 'to' must be greater"),
        ([timed(0, 2), timed(1, 3)], "from = 0, to = 2 and from = 1, to = 3, which overlap"),
        ([timed(0, 2, "  ")], r"an empty text \(from = 0, to = 2\)"),
        ([timed(-1, 2)], "prompts.0.from must be 0 or more, got -1"),
        ([timed(0, 2) | {"txt": "x"}], "unknown key 'prompts.0.txt'"),
        ([timed(0, "2")], "prompts.0.to must be a number, 0 or more, got '2'"),
        ([timed(0, True)], "prompts.0.to must be a number, 0 or more, got True"),
        ([timed(0, float("nan"))], "prompts.0.to"),
        ([{"from": 0, "text": "x"}], "prompts.0.to is missing"),
        ({"from": 0}, "prompts must be a list, got"),
    ],
)
def test_a_wrong_prompt_is_refused_with_its_value(prompts: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        request_for(tmp_path, prompts=prompts)
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(explain(caught.value, Request))


def latents(engine: Engine, request: Request) -> list[torch.Tensor]:
    """Give the latents of each section, in generation order."""
    *_, last = engine.generate(request)
    assert isinstance(last, Clip)
    return list(last.progress.sampled)


@pytest.mark.parametrize("transformer", KINDS)
def test_equal_prompts_give_the_video_of_a_single_prompt(
    tiny_engine: TinyEngine, tmp_path: Path, transformer: str
) -> None:
    engine = tiny_engine(transformer)
    spans = [timed(0, 0.5, "a cat"), timed(0.5, 0.8, "a cat")]
    plain, with_times = request_for(tmp_path), request_for(tmp_path, prompts=spans)
    assert everything(list(engine.generate(plain))) == everything(list(engine.generate(with_times)))


def test_a_timed_prompt_acts_in_its_sections_and_the_jobs_prompt_elsewhere(
    tiny_engine: TinyEngine, tmp_path: Path
) -> None:
    small = {"seconds": 1.6, "prompts": [timed(0.8, 1.2)]}  # sections of 0.4 s
    forward, backward = (tiny_engine(name) for name in ("framepack-f1", "framepack-i2v"))
    for engine, first in ((forward, 2), (backward, 1)):
        own = latents(engine, request_for(tmp_path, seconds=1.6))
        mixed = latents(engine, request_for(tmp_path, **small))
        whole = latents(engine, request_for(tmp_path, seconds=1.6, prompt="a dog"))
        equal = [torch.equal(one, other) for one, other in zip(own, mixed, strict=True)]
        assert equal == [number < first for number in range(4)], "those after it look back on it"
        assert not torch.equal(mixed[first], whole[first])
    # A section with the same past and the same text is the same: only the text of the section itself acts.
    first_two = [timed(0, 0.8, "a dog")]
    split = latents(forward, request_for(tmp_path, seconds=1.6, prompts=first_two))
    whole = latents(forward, request_for(tmp_path, seconds=1.6, prompt="a dog"))
    assert [torch.equal(one, other) for one, other in zip(split, whole, strict=True)][:3] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("transformer", KINDS)
def test_resuming_after_any_event_gives_the_same_bits(
    tiny_engine: TinyEngine, tmp_path: Path, transformer: str
) -> None:
    engine = tiny_engine(transformer)
    spans = [timed(0, 0.4), timed(0.8, 1.2, "a bird")]
    request = request_for(tmp_path, seconds=1.6, prompts=spans, **(GUIDED if "f1" in transformer else {}))
    conditioned = engine.encode(request)
    whole = list(engine.sample(request, conditioned))
    for number, event in enumerate(whole):
        following = list(islice(engine.sample(request, conditioned, resume=event.progress), 3))
        assert everything(following) == everything(whole[number + 1 : number + 4]), f"after event {number}"


def test_each_text_is_precomputed_once_and_one_positive_text_is_kept_at_a_time(
    tiny_engine: TinyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size, what is precomputed for one text takes 100 MB on the device."""
    engine = tiny_engine("framepack-f1")
    made: list[Any] = []
    precompute = engine.embedders.precompute

    def noting(text: Any, *args: Any) -> Any:
        made.append(text.pooled_prompt_embeds)
        return precompute(text, *args)

    monkeypatch.setattr(engine.embedders, "precompute", noting)
    spans = [timed(0, 0.8), timed(0.8, 1.2, "a bird")]  # then the job's own
    request = request_for(tmp_path, seconds=1.6, prompts=spans, true_cfg_scale=2.0)
    conditioned = engine.encode(request)
    events = list(engine.sample(request, conditioned))
    assert sum(isinstance(event, Step) for event in events) == 12
    dog, bird = conditioned.timed
    expected = [dog, conditioned.negative, bird, conditioned.positive]
    assert len(made) == len(expected)
    for text, wanted in zip(made, expected, strict=True):
        assert wanted is not None
        assert torch.equal(text, wanted.pooled_prompt_embeds)


def test_each_text_is_encoded_once(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    engine = tiny_engine("framepack-f1")
    spans = [timed(0, 0.4, "one"), timed(0.4, 0.8, "two"), timed(0.8, 1.2, "one")]
    conditioned = engine.encode(request_for(tmp_path, seconds=1.6, prompt="two", prompts=spans))
    one, two, again = conditioned.timed
    assert one is again
    assert two is conditioned.positive
