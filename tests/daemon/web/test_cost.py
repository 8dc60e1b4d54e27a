"""What a new video is said to cost, and when it ends behind the queue."""

from datetime import UTC, datetime
from typing import Any

from framepackd.web.cost import Cost, Plan, reckon

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
DONE = {"state": "done", "delivery": None, "model": "demo", "width": 100, "height": 50}
DONE |= {"step_seconds": 2.0, "decode_seconds": 5.0, "eta_seconds": None}


def report(*jobs: dict[str, Any], paused: str | None = None) -> dict[str, Any]:
    return {"daemon": {"paused": paused}, "jobs": list(jobs)}


def test_the_pace_of_the_last_video_of_the_model_counts_for_each_step_and_pixel() -> None:
    plan = Plan(model="demo", sections=4, steps=25, pixels=100.0 * 100.0, count=3)
    found = reckon(report(DONE), plan, NOON)
    assert found.seconds == 3 * 4 * (25 * 2 + 5) * 2
    assert found.ends_at == "2026-01-01T12:22:00Z"


def test_it_ends_behind_the_queue() -> None:
    queued = DONE | {"state": "queued", "eta_seconds": 600.0}
    found = reckon(report(queued, queued, DONE), Plan("demo", 1, 5, None), NOON)
    assert found == Cost(15.0, "2026-01-01T12:20:15Z", 2, paused=False)


def test_what_is_not_known_is_not_said() -> None:
    assert reckon(report(DONE), Plan("f1", 1, 5, None), NOON) == Cost(None, None, 0, paused=False)
    unknown = DONE | {"state": "queued"}
    assert reckon(report(unknown, DONE), Plan("demo", 1, 5, None), NOON).ends_at is None
    assert reckon(report(DONE, paused="by framepackd pause"), Plan("demo", 1, 5, None), NOON).ends_at is None
