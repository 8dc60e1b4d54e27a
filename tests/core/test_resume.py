"""Resuming after any event gives the bits of an uninterrupted run."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from framepack_core.engine import Clip, Step
from tests.core.requests import GUIDED, TinyEngine, comparable, everything, request_for

MODES = {
    "four-sections": ("framepack-i2v", {"latent_window_size": 2, "steps": 2}),
    "guided": ("framepack-i2v", GUIDED),
    "end": ("framepack-i2v", {"end": True}),
    "keyframes": ("framepack-i2v", {"keys": (0, 1), "end": True}),
    "cached": ("framepack-i2v", {"cache": "teacache", "steps": 9}),
    "cached-guided-end": ("framepack-i2v", {"cache": "teacache", "steps": 9, "end": True, **GUIDED}),
    "f1-four-sections": ("framepack-f1", {"latent_window_size": 2, "steps": 2}),
    "f1-guided": ("framepack-f1", GUIDED),
    "scheduled": ("framepack-i2v", {"cache": "magcache", "steps": 9, **GUIDED}),
    "f1-cached": ("framepack-f1", {"cache": "teacache", "steps": 9}),
    "one-step": ("framepack-f1", {"steps": 1}),
}
IN_OTHERS = {"guided", "cached", "f1-guided"}  # what these test, further modes test too


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.long) if mode in IN_OTHERS else mode for mode in MODES]
)
def test_resuming_after_any_event_gives_the_same_bits(
    tiny_engine: TinyEngine, tmp_path: Path, mode: str
) -> None:
    transformer, settings = MODES[mode]
    engine = tiny_engine(transformer)
    request = request_for(tmp_path, **settings)
    conditioned = engine.encode(request)
    whole = list(engine.sample(request, conditioned))
    if "cached" in mode or mode == "scheduled":
        assert not all(event.computed for event in whole if isinstance(event, Step)), "the cache is at work"
    for number, event in enumerate(whole):
        # What follows depends on the progress alone, which is compared too: three events are enough.
        following = list(islice(engine.sample(request, conditioned, resume=event.progress), 3))
        assert everything(following) == everything(whole[number + 1 : number + 4]), f"after event {number}"
    third = whole[len(whole) // 3]
    rest = list(engine.sample(request, conditioned, resume=third.progress))
    assert everything(rest) == everything(whole[len(whole) // 3 + 1 :])


def test_resuming_repeats_no_step_and_with_a_cache_at_most_two_calls(
    tiny_engine: TinyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine("framepack-i2v")
    calls = [0]
    forward = engine.core.forward

    def counting(*args: object, **named: object) -> object:
        calls[0] += 1
        return forward(*args, **named)

    monkeypatch.setattr(engine.core, "forward", counting)
    for cache, most in (("none", 0), ("teacache", 2), ("magcache", 1)):
        request = request_for(tmp_path, cache=cache, steps=9)
        conditioned = engine.encode(request)
        whole = list(engine.sample(request, conditioned))
        for number in (0, 4, 8, 9, 12):
            event = whole[number]
            calls[0] = 0
            left = sum(isinstance(later, Step) for later in whole[number + 1 :])
            for _ in engine.sample(request, conditioned, resume=event.progress):
                pass
            assert left <= calls[0] <= left + most, (cache, number)


def test_the_noise_generator_is_part_of_the_progress(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    """Other draws in between, in this process or another, change nothing."""
    engine = tiny_engine("framepack-i2v")
    request = request_for(tmp_path)
    events = list(engine.generate(request))
    first = next(event for event in events if isinstance(event, Clip))
    torch.manual_seed(99)
    torch.randn(100)
    *_, last = engine.generate(request, resume=first.progress)
    assert everything([last]) == everything(events[-1:])


def test_sections_whose_latents_are_known_are_decoded_again_but_not_sampled_again(
    tiny_engine: TinyEngine, tmp_path: Path
) -> None:
    """Lost frames are made again from the latents."""
    engine = tiny_engine("framepack-f1")
    request = request_for(tmp_path)
    whole = list(engine.generate(request))
    clips = [event for event in whole if isinstance(event, Clip)]
    lost = replace(clips[-1].progress, decoded=1, edge=clips[0].progress.edge)
    again = list(engine.generate(request, resume=lost))
    assert everything(again) == everything(clips[1:])


@pytest.mark.parametrize("mode", ["four-sections", "f1-four-sections", "cached"])
def test_dropping_later_sections_gives_the_progress_after_the_last_one_left(
    tiny_engine: TinyEngine, tmp_path: Path, mode: str
) -> None:
    """Lost latents are made again with the same noise and bits."""
    transformer, settings = MODES[mode]
    engine, request = tiny_engine(transformer), request_for(tmp_path, **settings)
    events = list(engine.generate(request))
    ends = [event.progress for event in events if isinstance(event, Step) and event.step == request.steps]
    midway = next(event.progress for event in reversed(events) if isinstance(event, Step))
    assert len(ends) >= 2
    for progress in (*ends[1:], midway):
        for left in range(1, len(progress.sampled)):
            lost = replace(progress, sampled=progress.sampled[:left], decoded=0, edge=None)
            expected = replace(ends[left - 1], decoded=0, edge=None)
            assert comparable(lost.without_later(request.seed)) == comparable(expected)


def test_a_copy_on_the_host_is_the_progress_itself(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    engine = tiny_engine("framepack-i2v")
    for event in engine.generate(request_for(tmp_path, cache="teacache")):
        assert comparable(event.progress.to_host().wait()) == comparable(event.progress)
