"""Which steps MagCache skips, and how its ratios are measured."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framepack_core.engine import Step
from framepack_core.errors import ModelError
from framepack_core.sampling.magcache import BUILT_IN_RATIOS, MAX_SKIPS, RETAINED, load_ratios, skipped_steps
from tests.conftest import KINDS
from tests.core.requests import TinyEngine, request_for


def test_the_published_models_skip_twelve_of_twenty_five_steps() -> None:
    assert skipped_steps(BUILT_IN_RATIOS["framepack"], 25) == [6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]
    assert skipped_steps(BUILT_IN_RATIOS["f1"], 25) == [6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 23]


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=100), st.integers(1, 100))
def test_the_first_quarter_is_computed_and_never_more_than_two_in_a_row_are_skipped(
    ratios: list[float], steps: int
) -> None:
    skipped = skipped_steps(ratios, steps)
    assert 0 not in skipped
    assert all(step >= int(RETAINED * steps) for step in skipped)
    for step in skipped:
        assert not all(step + more in skipped for more in range(MAX_SKIPS + 1))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_steps_of_the_schedule_are_skipped_in_every_section(
    tiny_engine: TinyEngine, tmp_path: Path, name: str
) -> None:
    events = list(tiny_engine(name).generate(request_for(tmp_path, cache="magcache", steps=25, seconds=1)))
    for section in range(2):
        steps = [event for event in events if isinstance(event, Step) and event.section == section]
        skipped = [event.step - 1 for event in steps if not event.computed]
        assert skipped == skipped_steps(BUILT_IN_RATIOS[KINDS[name]], 25)


def test_a_calibration_measures_the_ratios_of_the_schedule(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    engine = tiny_engine("framepack-i2v")
    calibrating = engine.calibrate(request_for(tmp_path, steps=9, seconds=3, true_cfg_scale=2.0))
    seen = []
    while True:
        try:
            seen.append(next(calibrating))
        except StopIteration as stopped:
            ratios = stopped.value
            break
    assert [(event.section, event.step) for event in seen] == [(0, step) for step in range(1, 10)]
    assert len(ratios) == 9
    assert ratios[0] == 1.0
    assert all(0.1 < ratio < 10 for ratio in ratios)
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"ratios": ratios}))
    assert load_ratios(file) == tuple(ratios)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "is damaged"),
        ('{"ratios": ["many"]}', "is damaged"),
        ('{"ratios": []}', "holds no ratios"),
        ('{"ratios": [1.0, -1]}', "holds no ratios"),
        ('{"ratios": [1.0, NaN]}', "holds no ratios"),
    ],
)
def test_ratios_that_cannot_be_used_are_refused_with_what_to_do(
    tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "ratios.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ModelError, match=said) as refused:
        load_ratios(file)
    assert "framepackd calibrate" in str(refused.value)
    assert str(file) in str(refused.value)
