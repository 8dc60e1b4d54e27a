"""When jobs end at their place in the queue, by a clock that stands still."""

from datetime import UTC, datetime, timedelta

from framepackd.control.schedule import PASSED_OVER, UNKNOWN, Place, lay_out, span

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def text(seconds: float) -> str:
    return f"{NOON + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"


def test_the_ends_of_twelve_queued_jobs_rise_by_each_jobs_length() -> None:
    lengths = [60.0 * number for number in range(1, 13)]
    places = lay_out([30.0, *lengths], NOON, paused=False)
    assert places[0] == Place(text(0), text(30))
    at = 30.0
    for length, place in zip(lengths, places[1:], strict=True):
        assert place == Place(text(at), text(at + length))
        at += length


def test_behind_a_job_of_unknown_length_no_time_is_promised() -> None:
    first, second, third = lay_out([60.0, None, 60.0], NOON, paused=False)
    assert (first, second, third) == (Place(text(0), text(60)), Place(text(60), None), UNKNOWN)


def test_a_job_that_is_passed_over_delays_nobody_and_one_about_to_end_has_its_place() -> None:
    ending, passed, next_one = lay_out([0.0, PASSED_OVER, 60.0], NOON, paused=False)
    assert (ending, passed, next_one) == (Place(text(0), text(0)), UNKNOWN, Place(text(0), text(60)))


def test_while_paused_no_time_is_known() -> None:
    assert lay_out([60.0, 60.0], NOON, paused=True) == [UNKNOWN, UNKNOWN]


def test_on_several_devices_a_job_starts_where_one_is_free_first() -> None:
    places = lay_out([60.0, 90.0, 10.0, None, 5.0], NOON, paused=False, devices=2)
    assert places == [
        Place(text(0), text(60)),
        Place(text(0), text(90)),
        Place(text(60), text(70)),
        Place(text(70), None),
        UNKNOWN,
    ]
    assert span([60.0, 90.0, 10.0], 2) == 90.0
    assert span([60.0, 90.0, 10.0], 1) == 160.0


def test_of_two_running_jobs_of_unknown_length_both_have_started() -> None:
    first, second, third = lay_out([None, None, 5.0], NOON, paused=False, devices=2)
    assert (first, second, third) == (Place(text(0), None), Place(text(0), None), UNKNOWN)
    known = lay_out([None, 60.0, 5.0], NOON, paused=False, devices=2)
    assert known == [Place(text(0), None), Place(text(0), text(60)), UNKNOWN]
