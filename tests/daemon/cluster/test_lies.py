"""What a bridge does not believe: a node that is of another version, late, silent, or lies."""

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from framepackd.cluster import bridge
from framepackd.cluster.bridge import Way, main
from framepackd.cluster.mirror import Mirror
from framepackd.worker import messages
from framepackd.worker.messages import Clear, Kept, Lost, Moved, Sampled, StepDone, Stopped, Written
from framepackd.worker.versions import versions
from tests.daemon.cluster.jobs import HOST, JOB, Front, front_work, heard, started
from tests.daemon.worker.jobs import SECTIONS, STEPS, chain_in

STEP = {"kind": "Said", "run": 1, "type": "StepDone"}


def lost(told: list[messages.Message]) -> str:
    """Give why a bridge ended: it says so once, and last."""
    assert [type(message) for message in told].count(Lost) == 1, told
    assert isinstance(told[-1], Lost)
    return told[-1].reason


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def kept(name: str = "checkpoint/state-00000001", **other: Any) -> Kept:
    return Kept(**{"job_id": JOB, "name": name, "size": 1, "offset": 0, "content": b"x"} | other)


def test_other_versions_are_told_in_one_line_and_nothing_is_begun(tmp_path: Path) -> None:
    front = Front()
    front.greet(versions=versions() | {"torch": "2.9.1"})
    told = front.end()
    assert lost(told) == (
        f"{HOST} has torch 2.9.1, here {versions()['torch']}: install the same versions on both machines"
    )
    assert len(told) == 1


def test_a_node_that_does_not_greet_is_lost_and_what_to_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "HELLO_SECONDS", 0.2)
    front = Front()
    front.node.send({"kind": "Alive"})  # the link is there, its node is not
    assert "framepackd node" in lost(heard(front.daemon))
    front.end()


def test_a_node_that_is_silent_is_lost_and_one_that_gives_signs_of_life_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "SILENT_SECONDS", 0.3)
    front = Front()
    front.greet()
    assert len(heard(front.daemon, lambda _: True)) == 1
    for _ in range(5):
        front.node.send({"kind": "Alive"})
        assert not front.daemon.poll(0.1)
    assert "silent" in lost(heard(front.daemon))
    front.end()


def test_what_the_link_says_of_a_lost_node_is_told(tmp_path: Path) -> None:
    front = Front()
    front.greet()
    front.node.send({"kind": "Lost", "reason": "its actor died"})
    assert "its actor died" in lost(front.end())


def test_without_a_link_the_bridge_says_what_to_start(tmp_path: Path) -> None:
    daemon, theirs = multiprocessing.Pipe()
    main(theirs, os.getppid(), Way(tmp_path / "none.sock", HOST, "cpu", tmp_path, tmp_path))
    assert "framepackd node" in daemon.recv().reason
    daemon.close()
    theirs.close()


def test_a_daemon_that_is_done_with_a_card_ends_its_bridge() -> None:
    front = Front()
    front.daemon.close()
    with pytest.raises(EOFError):
        front.asked()
    front.close()


@pytest.mark.parametrize(
    "lie",
    [
        {"kind": "Work"},
        {"kind": "Said"},
        {"kind": "Said", "run": 1, "type": "Work", "message": {}},
        {**STEP, "message": {"section": 1, "step": 1}},
        {**STEP, "message": {"section": "1", "step": 1, "seconds": 1}},
        {
            "kind": "Said",
            "run": 1,
            "type": "StepDone",
            "message": {"section": 1, "step": 1, "seconds": 1e999},
        },
        {"kind": "Said", "run": 1, "type": "Written", "message": {"type": "Sampled", "message": {}}},
        {"kind": "Said", "run": 1, "type": "Kept", "message": {"name": "result/.mp4"}},
        {"kind": "Said", "run": 1, "type": "Finished", "message": None},
        {"kind": "Lacks", "run": 1, "names": ["/etc/passwd"]},
        {"kind": "Lacks", "run": 1, "names": ["manifest.json"]},
        {"kind": "Hello"},
        {"kind": "Died", "manner": 7},
    ],
)
def test_a_frame_that_no_node_sends_ends_the_bridge_and_writes_nothing(
    tmp_path: Path, lie: dict[str, Any]
) -> None:
    work = front_work(tmp_path)
    front = Front()
    started(front, work)
    before = tree(tmp_path)
    text = json.dumps(lie).replace("Infinity", "1e999").encode()
    front.node.send_packed(len(text).to_bytes(4, "big") + bytes(4) + text)
    assert f"{HOST} sends what no node sends" in lost(front.end())
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "said",
    [
        kept("../20260101-000000-bbbbbb/result/.mp4"),
        kept("/etc/passwd"),
        kept(size=10**12),
        kept(job_id="20260101-000000-bbbbbb"),
        kept(offset=5, size=9),
        Clear(JOB, "manifest.json"),
        Moved(JOB, "checkpoint", "result"),
        StepDone(SECTIONS + 1, 1, 1.0),
        StepDone(0, 1, 1.0),
        StepDone(1, STEPS + 1, 1.0),
        StepDone(1, 1, -1.0),
        messages.SectionDecoded(99, 1.0),
        messages.Resumed(SECTIONS * STEPS + 1),
        messages.Resumed(1, (1, 0)),
        messages.Lowered("card", 10**6, "less"),
        messages.Finished({}, {}, {}, None),  # and has sent no video
        messages.Finished({}, {}, {}, None, loras=({"keys": 1},)),
        Written(Stopped()),
    ],
)
def test_what_no_worker_says_of_the_job_ends_the_bridge_and_writes_nothing(
    tmp_path: Path, said: messages.Message
) -> None:
    work = front_work(tmp_path)
    front = Front()
    run = started(front, work)
    before = tree(tmp_path)
    front.say(run, said)
    assert f"{HOST} sends what no node sends" in lost(front.end())
    assert tree(tmp_path) == before


def test_a_video_that_was_not_sent_is_not_written(tmp_path: Path) -> None:
    front = Front()
    run = started(front, front_work(tmp_path))
    front.say(run, Sampled(), Written(messages.Finished({}, {}, {}, None)))
    assert "has not sent it" in lost(front.end())


def test_a_frame_as_deep_as_it_is_long_ends_the_bridge_in_words(tmp_path: Path) -> None:
    front = Front()
    started(front, front_work(tmp_path))
    text = b'{"kind":"Said","run":1,"x":' + b"[" * 400_000 + b"]" * 400_000 + b"}"
    front.node.send_packed(len(text).to_bytes(4, "big") + bytes(4) + text)
    assert "sends what no node sends" in lost(front.end())


def test_the_clips_of_a_chain_are_counted_as_they_are(tmp_path: Path) -> None:
    work = front_work(tmp_path, chain_in)
    front = Front()
    run = started(front, work)
    front.say(run, messages.Resumed(STEPS + 1, (STEPS, 1)), messages.Resumed(1))
    told = front.end()
    assert told[0] == messages.Resumed(STEPS + 1, (STEPS, 1))
    assert "Resumed" in lost(told)


def test_messages_of_runs_that_are_over_or_never_were_are_dropped(tmp_path: Path) -> None:
    work = front_work(tmp_path)
    front = Front()
    run = started(front, work)
    front.say(run, Stopped())
    assert heard(front.daemon, lambda _: True) == [Stopped()]
    again = front.begin(work)
    before = tree(tmp_path)
    for other in (run, again + 1, 0, -1):
        front.say(other, kept(), StepDone(1, 1, 1.0), Sampled(), Written(Stopped()), Stopped())
    front.say(again, StepDone(1, 1, 0.5))
    told = front.end()
    assert told[0] == StepDone(1, 1, 0.5)
    assert lost(told[1:])
    assert tree(tmp_path) == before


def test_a_second_job_is_not_sampled_while_the_first_is_written(tmp_path: Path) -> None:
    first, second = front_work(tmp_path), front_work(tmp_path, job="20260101-000000-bbbbbb")
    front = Front()
    front.say(started(front, first), Sampled())
    assert heard(front.daemon, lambda _: True) == [Sampled()]
    front.say(front.begin(second), Sampled())
    assert "sampled" in lost(front.end())


@pytest.mark.parametrize("frame", [b"\xff" * 64, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_what_is_no_frame_ends_the_bridge(frame: bytes) -> None:
    front = Front()
    front.node.send_packed(frame)
    assert "sends what no node sends" in lost(front.end())


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, messages.Blocked), (errno.EACCES, messages.Failed)]
)
def test_a_disk_that_takes_no_more_ends_the_job_here_and_has_the_node_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[messages.Message]
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    work = front_work(tmp_path)
    front = Front()
    run = started(front, work)
    monkeypatch.setattr(Mirror, "keep", full)
    front.say(run, kept(), StepDone(1, 2, 1.0))
    asked = front.asked().header
    assert (asked["kind"], asked["run"], asked["keep"]) == ("Tell", run, False)
    front.say(run, kept(), Stopped())
    told = front.end()
    assert [type(message) for message in told] == [kind, Lost]
    assert os.strerror(number) in str(told[0])


def test_a_disk_that_is_full_while_a_video_is_written_ends_that_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    work = front_work(tmp_path)
    front = Front()
    run = started(front, work)
    front.say(run, Sampled())
    monkeypatch.setattr(Mirror, "keep", full)
    front.say(run, kept("result/.mp4"), Written(messages.Finished({}, {}, {}, None)))
    told = front.end()
    assert isinstance(told[1], Written)
    assert isinstance(told[1].reply, messages.Blocked)
