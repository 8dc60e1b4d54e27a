"""The published model on a played GPU: it fits as planned, and nothing waits in a step."""

import pytest

from benchmarks.played import measure
from framepack_core.memory.footprint import Placement
from tests.played.cards import CARDS


@pytest.mark.parametrize(
    ("size", "placement", "decode"),
    [(6, "partly", True), pytest.param(16, "partly", False, marks=pytest.mark.long)],
)
def test_a_card_holds_what_is_planned_and_computes_without_a_wait(
    size: int, placement: Placement, *, decode: bool
) -> None:
    measured = measure(CARDS[size], decode=decode)
    assert measured.placement == placement
    assert not measured.faults
    assert measured.held <= measured.plan.vram * 1.05
    step = measured.counts["step"]
    assert not measured.waits["step"], "the host runs ahead"
    assert step["copies to the card"] == measured.streamed, (
        "a block comes as one piece, and nothing else does"
    )
    assert 0 < measured.streamed < 60
    assert step["copies to the host"] == 0
