"""Runs the rows one after another in a child process, and writes the results as they come. No torch here."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from benchmarks.first_light import CHECKS, Check

ROOT = Path(__file__).parents[2]
PATIENCE = 3  # times as long, where all is small: other tests may run beside
SHORT = 5.0  # seconds: with less left nothing is begun


class Child:
    """A process that computes rows until one breaks it."""

    def __init__(self, log: TextIO) -> None:
        """Start it; what it and its libraries say goes to the log."""
        self._reads, writes = os.pipe()
        command = [sys.executable, "-m", "benchmarks.first_light.child", str(writes)]
        self._process = subprocess.Popen(  # noqa: S603 # our own
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(writes,),
            cwd=ROOT,
            start_new_session=True,  # so that what it has started can be ended with it
        )
        os.close(writes)
        self._read = b""
        self.usable, self._over = True, False

    def compute(self, check: Check, limit: float) -> Iterator[dict[str, Any]]:
        """Have it compute a row; gives its words, the last of them how it ended, whatever happens."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + limit
        with suppress(BrokenPipeError):  # reported below, by how it ended
            self._process.stdin.write(f"{json.dumps(vars(check))}\n".encode())
            self._process.stdin.flush()
        while True:
            while b"\n" in self._read:
                line, _, self._read = self._read.partition(b"\n")
                word = json.loads(line)
                yield word
                if "end" in word:
                    self.usable = not word["end"]["broken"]
                    return
            ready, _, _ = select.select([self._reads], [], [], max(deadline - time.monotonic(), 0))
            received = os.read(self._reads, 1 << 16) if ready else b""
            if not received:
                why = (
                    self._manner_of_death() if ready else f"it took longer than {limit:.0f} s, and was ended"
                )
                self.end()
                yield {"end": {"status": "fail", "why": why, "broken": True}}
                return
            self._read += received

    def _manner_of_death(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}: see first-light.log"

    def end(self) -> None:
        """End it, with all that it has started."""
        if self._over:
            return
        self._over, self.usable = True, False
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self._reads)


class Record:
    """What ran, in files that are whole at any time."""

    def __init__(self, out: Path, **run: Any) -> None:
        """Begin it."""
        self._out = out
        self.rows: list[dict[str, Any]] = []
        self._run = run | {"began": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "rows": self.rows}

    def write(self) -> None:
        """Write it."""
        self._replace("first-light.json", json.dumps(self._run, indent=1, ensure_ascii=False))
        self._replace("first-light.md", self.table())

    def _replace(self, name: str, text: str) -> None:
        beside = self._out / f"{name}.part"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self._out / name)

    def table(self) -> str:
        """Write it as a table."""
        lines = ["| row | | figure | beside | unit | |", "| --- | --- | --- | --- | --- | --- |"]
        for row in self.rows:
            taken = f"{row['seconds']:.0f} s" if row["seconds"] else ""
            lines.append(_line(f"**{row['name']}**", f"**{row['status']}**", taken, "", "", row["why"]))
            for figure in row["figures"]:
                mark = {True: "", False: " ✗", None: ""}[figure["good"]]
                beside = _number(figure["baseline"]) if figure["baseline"] is not None else ""
                cells = (_number(figure["value"]) + mark, beside, figure["unit"], figure["says"])
                lines.append(_line(figure["name"], "", *cells))
        return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def _number(value: float | str | None) -> str:
    if value is None:
        return "no number"
    return value if isinstance(value, str) else f"{value:.4g}"


def chosen(only: Sequence[str], skip: Sequence[str]) -> Iterator[Check]:
    """Give the rows that are wanted, in their order."""
    for check in CHECKS:
        if (not only or check.name in only) and check.name not in skip:
            yield check


def first_light(out: Path, minutes: float, only: Sequence[str], skip: Sequence[str], *, tiny: bool) -> bool:
    """Compute rows for so many minutes; says whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + minutes * 60
    record = Record(out, minutes=minutes, tiny=tiny, only=list(only), skip=list(skip))
    if tiny:
        os.environ["FRAMEPACKD_BENCHMARK"] = "tiny"
    child: Child | None = None
    with (out / "first-light.log").open("w", encoding="utf-8") as log:
        for check in chosen(only, skip):
            row: dict[str, Any] = {"name": check.name, "status": "", "why": "", "seconds": 0.0, "figures": []}
            record.rows.append(row)
            left = deadline - time.monotonic()
            if left < (SHORT if tiny else check.seconds):
                why = f"takes about {check.seconds:.0f} s, and {max(left, 0):.0f} s were left"
                row |= {"status": "not run", "why": why}
            else:
                row["status"] = "running"
                record.write()
                began = time.monotonic()
                if child is None or not child.usable:
                    if child is not None:
                        child.end()
                    child = Child(log)
                limit = check.limit * (PATIENCE if tiny else 1)
                for word in child.compute(check, min(limit, left)):
                    if "figure" in word:
                        row["figures"].append(word["figure"])
                    else:
                        row |= {key: word["end"][key] for key in ("status", "why")}
                    row["seconds"] = round(time.monotonic() - began, 2)
                    record.write()
            record.write()
            print(f"{row['name']:18} {row['status']:8} {row['seconds']:6.1f} s  {row['why']}", flush=True)
    if child is not None:
        child.end()
    print(f"\n{record.table()}\nwritten to {out}")
    return all(row["status"] != "fail" for row in record.rows)
