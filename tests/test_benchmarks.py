"""First light in its tiny form: what is to run on a GPU one day must run at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.first_light import CHECKS, Check, Figure, child, run
from benchmarks.first_light.carry import LIST, wheels

ROOT = Path(__file__).parents[1]
CARRIED = 64 << 20  # bytes that can be carried, the tree included
# Of first light, without a GPU: what a machine without one can compute, and what it cannot.
COMPUTED = {
    "versions": "pass",
    "parity-float32": "pass",
    "parity-bfloat16": "pass",
    "full-shape": "figure",
    "step": "pass",
    "decode": "figure",
    "killed-worker": "pass",
    "reference-loop": "figure",
}
ON_A_GPU = ["placements", "page-locked", "broken-context", "fp8"]


def first_light(out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--first-light", "--tiny", "--out", str(out), *options],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads((out / "first-light.json").read_text())["rows"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_tiny_form_computes_every_row_that_needs_no_gpu(tmp_path: Path) -> None:
    code, rows = first_light(tmp_path)
    assert [row["name"] for row in rows] == [check.name for check in CHECKS]
    ended = {row["name"]: row for row in rows}
    assert {name: ended[name]["status"] for name in COMPUTED} == COMPUTED, rows
    for name in ON_A_GPU:
        assert (ended[name]["status"], ended[name]["why"]) == ("skipped", "needs a GPU")
    assert all(row["figures"] for row in rows if row["status"] != "skipped")
    assert code == 0
    table = (tmp_path / "first-light.md").read_text()
    assert all(f"| **{check.name}** |" in table for check in CHECKS)


def test_rows_are_chosen_by_name_and_what_has_no_time_is_said(tmp_path: Path) -> None:
    code, rows = first_light(
        tmp_path, "--only", "versions", "--only", "fp8", "--skip", "fp8", "--minutes", "0"
    )
    assert [(row["name"], row["status"]) for row in rows] == [("versions", "not run")]
    assert rows[0]["why"] == "takes about 5 s, and 0 s were left"
    assert code == 0


def test_a_row_that_is_none_is_refused() -> None:
    answer = CliRunner().invoke(main, ["gpu", "--first-light", "--only", "warp"])
    assert answer.exit_code == 2
    assert "'warp' is not one of" in answer.output


# Rows that go wrong, in a process like that of the real ones; none of them imports torch.
FAULTY = """
import os, signal, time
from benchmarks.first_light import Figure, SkippedError
def good(): yield Figure("a", 1.0, good=True)
def bad(): yield Figure("a", 1.0, good=True); yield Figure("b", float("nan"), good=False)
def raises(): yield Figure("before", 1.0); raise ValueError("so it is")
def skips(): raise SkippedError("not here"); yield
def dies(): yield Figure("before", 1.0); os.kill(os.getpid(), signal.SIGKILL)
def hangs(): yield Figure("before", 1.0); time.sleep(600)
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rows that go wrong in place of the real ones."""
    names = ("good", "bad", "raises", "skips", "dies", "hangs", "good-again")
    checks = [
        Check(name, f"faulty:{name.partition('-')[0]}", 0, 2 if name == "hangs" else 60, gpu=False)
        for name in names
    ]
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "CHECKS", checks)


@pytest.mark.usefixtures("faulty")
def test_what_fails_dies_or_hangs_is_written_and_the_run_goes_on(tmp_path: Path) -> None:
    assert not run.first_light(tmp_path, 9, [], [], tiny=False)
    rows = json.loads((tmp_path / "first-light.json").read_text())["rows"]
    ended = {row["name"]: (row["status"], row["why"]) for row in rows}
    assert ended == {
        "good": ("pass", ""),
        "bad": ("fail", ""),
        "raises": ("fail", "ValueError: so it is"),
        "skips": ("skipped", "not here"),
        "dies": ("fail", "its process was killed by SIGKILL: see first-light.log"),
        "hangs": ("fail", "it took longer than 2 s, and was ended"),
        "good-again": ("pass", ""),
    }
    assert [row["figures"][0]["name"] for row in rows if row["name"] in ("raises", "dies", "hangs")] == [
        "before"
    ] * 3
    assert rows[1]["figures"][1]["value"] is None  # JSON has no NaN
    assert "ValueError: so it is" in (tmp_path / "first-light.log").read_text()


def test_a_row_that_lacks_a_package_says_which() -> None:
    check = Check("row", "nothing:at_all", 0, 1, gpu=False, needs=("surely_not_installed",))
    answer = child.compute(check, None)
    assert answer == {"status": "skipped", "why": "not installed: surely_not_installed", "broken": False}


def test_after_an_error_of_the_device_the_next_row_gets_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: Check) -> Any:
        yield from ()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(child, "rows_of", fails)
    assert child.compute(CHECKS[0], None)["broken"]


def of_benchmarks() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "benchmarks"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have benchmarks be small, whatever other tests have imported: they decide it when they are imported."""
    before = of_benchmarks()
    for name in before:
        del sys.modules[name]
    monkeypatch.setenv("FRAMEPACKD_BENCHMARK", "tiny")
    yield
    for name in of_benchmarks():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_the_rows_that_stream_run_on_a_gpu_that_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a GPU does what they look for is for one to say; here they must not fail by themselves."""
    import torch

    from benchmarks import gpu as steps
    from benchmarks import placements
    from benchmarks.first_light import machine
    from tests.played.cards import H100_80
    from tests.played.gpu import PlayedGpu
    from tests.played.models import played
    from tests.played.tensors import CUDA

    made, dtypes = placements.models, (torch.bfloat16, torch.float32)  # in half precision a CPU takes long
    monkeypatch.setattr(placements.devices, "choose_dtypes", lambda *_: dtypes)
    monkeypatch.setattr(placements, "models", lambda *given: played(made(*given)))
    monkeypatch.setattr(placements, "CAPS", (8,))
    monkeypatch.setattr(placements, "DEVICE", CUDA)
    monkeypatch.setattr(steps, "DEVICE", CUDA)
    with PlayedGpu(H100_80) as gpu, torch.inference_mode():
        rows = list(placements.rows())
        locked, *_ = machine.page_locked()
    assert not gpu.faults
    assert {row.name.split(", ")[1] for row in rows} == {"all", "core", "partly", "streamed"}
    assert all(row.good for row in rows if row.good is not None)
    assert locked.good


def test_a_front_of_four_played_cards_records_what_they_say(
    tmp_path: Path,
) -> None:
    asked = {"folder": str(tmp_path), "cards": 4, "pace": 0.05, "status": True, "seconds": 1.5, "queued": 8}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many_cards.daemon", json.dumps(asked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["steps"] <= found["messages"]
    assert 0 < found["commits"] <= found["messages"]
    assert 0 < found["delays"][0] <= found["delays"][1]


def test_the_disk_of_a_front_is_measured_with_durable_writes(tmp_path: Path) -> None:
    from benchmarks import front

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(front, "WRITTEN_SECONDS", 0.1)
        patched.setattr(front, "STEP_BYTES", 1 << 16)
        rate, seconds = front.written(tmp_path, 2)
    assert rate > 0 < seconds
    assert front.syncs(tmp_path) > 0


def test_the_list_of_wheels_gives_its_total_and_leaves_room_for_the_tree() -> None:
    text = LIST.read_text()
    total = sum(size for _, size in wheels())
    packed = int(text.partition("pack` they take ")[2].split()[0].replace(",", ""))
    assert f"{total:,} together" in text.replace("\n# ", " ")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what is tracked cannot be told from what lies about")
    tree = sum((ROOT / name).stat().st_size for name in listed.stdout.splitlines() if (ROOT / name).exists())
    assert tree + packed < CARRIED


def test_a_figure_that_is_no_number_can_be_written() -> None:
    assert Figure("x", float("inf")).as_json["value"] is None
