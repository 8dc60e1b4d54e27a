"""Everything nasty at once, before a real daemon: each comes to its end, none harms, none is lost."""

import hashlib
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import TINY_MODEL, Daemon, MakeDaemon
from tests.acceptance.nasty_inputs import CANARY, DONE, FAILED, IGNORED, WAITING, Case, cases, put_loras
from tests.acceptance.nasty_pictures import GOOD

DAEMON_MEMORY = 200 << 20  # the highest it may get, bytes
DECODER_MEMORY = 1 << 30  # the same for the process that decodes pictures
QUIET_SECONDS = 30
SWAPS = 40
HASHED = 16 << 20  # larger files are known by their size


def test_whatever_is_dropped_comes_to_its_end_and_harms_nothing(
    make_daemon: MakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads wait for each other on a busy machine
    daemon = make_daemon(models=TINY_MODEL)
    daemon.config.write_text(daemon.config.read_text().replace('model = "demo"', 'model = "tiny"'))
    outside = put_canaries(daemon.root / "outside")
    put_loras(daemon.state / "loras")
    table = {f"{number:03}": case for number, case in enumerate(cases())}
    assert len(table) >= 150
    for folder, case in table.items():
        (daemon.inbox / folder).mkdir()
        case.drop(daemon.inbox / folder, outside)
    dropped, canaries = fingerprints(daemon.inbox), states_of(outside)
    daemon.start()
    with swapping(daemon.inbox / "swapped", outside):
        wait_for_the_end(daemon, table)
    memory, decoder = peak_memory(daemon)
    with capsys.disabled():
        counts = Counter(case.outcome for case in table.values())
        print(f"\n{len(table)} nasty inputs: {dict(counts)}; ", end="")
        print(f"peak memory: daemon {memory >> 20} MiB, decoder {decoder >> 20} MiB")
    assert memory < DAEMON_MEMORY
    assert decoder < DECODER_MEMORY
    outputs = [daemon.command(*command).stdout for command in COMMANDS]
    outputs += [daemon.command("show", job["id"]).stdout for job in daemon.status()["jobs"][:3]]
    assert daemon.stop() == 0
    assert "\n".join(mistakes(daemon, table)) == ""
    assert states_of(outside) == canaries
    assert not [path for path in files_below(daemon.root) if CANARY.encode() in content(path)], "copied"
    left = fingerprints(daemon.inbox, daemon.outbox, daemon.failed, daemon.state / "jobs")
    assert {key: left[key] for key in dropped} == dropped, "each file once, in one place"
    assert strange_rights(daemon.outbox, daemon.failed) == []
    for said in (*outputs, daemon.log.read_text()):
        assert [c for c in said if not c.isprintable() and c != "\n"] == []


COMMANDS = (("status",), ("status", "--json"), ("check", "--no-gpu"))


def put_canaries(outside: Path) -> Path:
    outside.mkdir()
    for name in ("secret.png", "secret.txt"):
        (outside / name).write_text(CANARY)
    (outside / "secret.toml").write_text(f'prompt = "{CANARY}"')
    (outside / "linked.txt").write_text("pan left")
    return outside


def states_of(folder: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    """Tell everything about files that nobody may change; links to them may come and go."""
    return {
        path.name: (status.st_ino, status.st_mode, status.st_uid, status.st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        for status in [path.stat()]
    }


def files_below(*roots: Path) -> Iterator[Path]:
    """Find regular files, outside the canaries' folder."""
    for root in roots:
        for folder, names, here in os.walk(root):
            names[:] = [name for name in names if name not in ("outside", "swapped")]
            for name in here:
                if stat.S_ISREG(Path(folder, name).lstat().st_mode):
                    yield Path(folder, name)


def content(path: Path) -> bytes:
    return path.read_bytes() if path.stat().st_size < HASHED else str(path.stat().st_size).encode()


def fingerprints(*roots: Path) -> Counter[str]:
    return Counter(hashlib.sha256(content(path)).hexdigest() for path in files_below(*roots))


@contextmanager
def swapping(folder: Path, outside: Path) -> Iterator[None]:
    """Have a text be a file, a link and a pipe in turns, and another grow, while the daemon looks at them."""
    folder.mkdir()
    for name in ("swapped.png", "growing.png"):
        (folder / name).write_bytes(GOOD)
    end = threading.Event()

    def swap() -> None:
        new = folder / ".new"
        for number in range(SWAPS):
            if end.wait(0.4 if number % 8 else 0.01):  # now and then long enough to be taken
                return
            if number % 3 == 0:
                new.symlink_to(outside / "secret.txt")
            elif number % 3 == 1:
                os.mkfifo(new)
            else:
                new.write_text("pan left")
            new.replace(folder / "swapped.txt")
            with (folder / "growing.txt").open("a") as growing:
                growing.write("and on ")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def wait_for_the_end(daemon: Daemon, table: dict[str, Case]) -> None:
    """Wait until as much has come out as should, or nothing has for long, and nothing is on its way."""
    expected = sum(case.outcome in (DONE, FAILED) for case in table.values())
    progress = [(0, time.monotonic())]

    def ended() -> bool:
        time.sleep(0.5)  # looking costs the daemon time as well
        ends = (
            path.name.endswith((".mp4", ".error.txt")) for path in files_below(daemon.outbox, daemon.failed)
        )
        out = sum(ends)
        if out > progress[-1][0]:
            progress.append((out, time.monotonic()))
        if out < expected and time.monotonic() - progress[-1][1] < QUIET_SECONDS:
            return False
        counts = daemon.status()["counts"]
        return counts["queued"] + counts["running"] == 0

    daemon.until(ended, "everything to come to its end", 240)


def peak_memory(daemon: Daemon) -> tuple[int, int]:
    """Give the most memory that the daemon, and its process for pictures, have ever had, in bytes."""
    assert daemon.process is not None
    process = daemon.process.pid
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    (decoder,) = (
        pid for pid in children if b"framepackd.inbox.inspect" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    peaks = [
        re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in (process, decoder)
    ]
    daemon_peak, decoder_peak = (int(peak[1]) << 10 for peak in peaks if peak)
    return daemon_peak, decoder_peak


def mistakes(daemon: Daemon, table: dict[str, Case]) -> list[str]:
    """Say of each case that ended otherwise how it did."""
    waiting = daemon.status()["waiting"]
    found = []
    for folder, case in table.items():
        reasons = [
            entry["missing"]
            for entry in waiting
            if (entry["folder"] + "/" + entry["name"]).startswith(folder)
        ]
        # One of the texts, which are empty, is called a.error.txt.
        errors = [
            text for path in (daemon.failed / folder).rglob("*.error.txt") if (text := path.read_text())
        ]
        videos = list((daemon.outbox / folder).rglob("*.mp4"))
        actual = {WAITING: reasons, FAILED: errors, DONE: videos, IGNORED: []}
        others = [outcome for outcome in actual if outcome != case.outcome and actual[outcome]]
        if others or (case.outcome != IGNORED and not actual[case.outcome]):
            found.append(f"{folder} {case.name}: {case.outcome} expected: {actual}")
        elif case.said and not all(case.said in str(text) for text in actual[case.outcome]):
            found.append(f"{folder} {case.name}: {case.said!r} expected: {actual[case.outcome][:3]}")
        elif any("please report it" in str(text) for text in actual[case.outcome]):
            found.append(f"{folder} {case.name}: an error of framepackd's own: {actual[case.outcome][:3]}")
    return found


def strange_rights(*roots: Path) -> list[str]:
    """List what has other rights than what is delivered (for the group) or only shown (to be read)."""
    return [
        f"{path} {path.stat().st_mode:o}"
        for path in files_below(*roots)
        if stat.S_IMODE(path.stat().st_mode) not in (0o660, 0o640)
    ]
