"""Requests check themselves, and mistakes are told in words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from framepack_core.request import GenerationSettings, Request, explain


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
        ({"steps": 2.5}, "steps must be 1 to 100, got 2.5"),
        ({"steps": True}, "steps must be 1 to 100, got True"),
        ({"seconds": float("nan")}, "seconds must be 1 to 120, got nan"),
        ({"width": 40, "height": 48}, "width must be 32 to 4096 in steps of 16, got 40"),
        ({"width": 48}, "width is set and height is not: set both, or neither"),
        ({"cache": "magic"}, "cache input should be 'none', 'teacache' or 'magcache', got 'magic'"),
        ({"stepz": 1}, "unknown key 'stepz'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_range(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        GenerationSettings.model_validate(settings)
    assert explain(raised.value, GenerationSettings) == said
