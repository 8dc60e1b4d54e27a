"""Confinement: what is not allowed is out of reach, for a process and for those that it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from framepackd.cluster import landlock

PROGRAM = """
import subprocess, sys
from pathlib import Path
from framepackd.cluster import landlock
secret, allowed, written = map(Path, sys.argv[1:])
code = [*map(Path, (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/etc"))]
rules = [(place, landlock.READ) for place in [*code, allowed, Path("/is/not/there")]]
assert landlock.confine([*rules, (written, landlock.WRITE)])
assert allowed.read_text() == "allowed"
(written / "new").write_text("1")
(written / "new").rename(written / "renamed")
for forbidden in (
    lambda: secret.read_text(),
    lambda: list(secret.parent.iterdir()),
    lambda: secret.write_text("mine"),
    lambda: allowed.write_text("mine"),
    lambda: (secret.parent / "new").touch(),
    secret.unlink,
):
    try:
        forbidden()
    except PermissionError:
        continue
    sys.exit("not confined")
sys.exit(subprocess.run(["cat", secret], capture_output=True).returncode == 0)
"""


def test_the_code_of_an_installed_package_is_all_that_lies_beside_it_wherever_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("libraries/installed", "libraries/installed-1.dist-info", "checkout/edited"):
        (tmp_path / folder).mkdir(parents=True)
    for package in ("libraries/installed", "checkout/edited"):
        (tmp_path / package / "__init__.py").touch()
        monkeypatch.syspath_prepend(str((tmp_path / package).parent))
    readable = {place for place, right in landlock.code("installed", "edited") if right == landlock.READ}
    assert {place for place in readable if place.is_relative_to(tmp_path)} == {
        tmp_path / "libraries",  # what it imports is there too
        tmp_path / "checkout/edited",
    }


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    secret, allowed, written = tmp_path / "state/queue.db", tmp_path / "allowed", tmp_path / "written"
    secret.parent.mkdir()
    written.mkdir()
    secret.write_text("secret")
    allowed.write_text("allowed")
    return [secret, allowed, written]


def test_a_confined_process_reaches_nothing_but_what_is_allowed(places: list[Path]) -> None:
    if not landlock.version():
        pytest.skip("this kernel has no Landlock")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, places)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert places[0].read_text() == "secret"
    assert (places[2] / "renamed").read_text() == "1"
