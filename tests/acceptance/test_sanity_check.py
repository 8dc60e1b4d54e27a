"""The sanity check as a person runs it."""

import pytest
from PIL import Image

from tests.acceptance.conftest import Daemon


@pytest.mark.long
def test_it_says_what_it_found_and_shows_frames(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a processor computes that has none of the instructions of this one: rounding differs, no more.
    for variable, value in {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    }.items():
        monkeypatch.setenv(variable, value)
    sheet = daemon.root / "sheet.png"
    answer = daemon.command("sanity-check", "--output", str(sheet))
    assert answer.returncode == 0, answer.stderr
    for said in ("CPU", "float32", "native", "s a step", "as recorded", str(sheet)):
        assert said in answer.stdout
    with Image.open(sheet) as image:
        assert image.size == (64 * 6, 64)


def test_beside_a_daemon_that_may_use_the_gpu_it_is_refused(daemon: Daemon) -> None:
    daemon.start()
    refused = daemon.command("sanity-check")
    assert refused.returncode == 1
    assert "run framepackd pause first" in refused.stderr
