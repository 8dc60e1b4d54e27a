"""Requests check themselves, and mistakes are explained in words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from framepack_core.mistakes import explain
from framepack_core.request import GenerationSettings, Request


@given(
    seconds=st.floats(1, 120),
    seed=st.integers(0, 2**32 - 1),
    prompt=st.text(),
    keyframes=st.dictionaries(st.integers(0, 50), st.just(Path("k.png")), max_size=3),
)
def test_a_request_survives_json(seconds: float, seed: int, prompt: str, keyframes: dict[int, Path]) -> None:
    request = Request(image=Path("a.png"), prompt=prompt, seconds=seconds, seed=seed, keyframes=keyframes)
    assert Request.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seconds": 0}, "seconds must be 1 to 120, got 0"),
        ({"steps": 101}, "steps must be 1 to 100, got 101"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 100, got 2.5"),
        ({"steps": True}, "steps must be 1 to 100, got True"),
        ({"seconds": "long"}, "seconds must be a number from 1 to 120, got 'long'"),
        ({"seconds": float("nan")}, "seconds must be 1 to 120, got nan"),
        ({"width": 40, "height": 48}, "width must be 32 to 4096 in steps of 16, got 40"),
        ({"width": 48}, "width is set and height is not: set both, or neither"),
        ({"cache": "magic"}, "cache must be 'none', 'teacache' or 'magcache', got 'magic'"),
        ({"negative_prompt": 3}, "negative_prompt must be text, got 3"),
        ({"stepz": 1}, "unknown key 'stepz': did you mean 'steps'?"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        (
            {"prompts": [{"from": 0, "txt": "x"}]},
            "prompts.0.to is missing; prompts.0.text is missing; "
            "unknown key 'prompts.0.txt': did you mean 'prompts.0.text'?",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_range(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        GenerationSettings.model_validate(settings)
    assert explain(raised.value, GenerationSettings) == said
