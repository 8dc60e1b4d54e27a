"""What reads from nodes is confined: a link to its code and Ray's folder, a bridge to its jobs' folders."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framepackd.cluster import landlock, link

PROGRAM = """
import os, sys
from pathlib import Path
from framepackd.cluster import link
folder, token, secret = map(Path, sys.argv[1:])
link.confine(folder)
import ray
import framepackd.cluster.actor, framepack_core.errors
assert token.read_text() == "token"
(folder / "session").mkdir()
Path(os.devnull).write_text("")
for forbidden in (
    secret.read_bytes,
    lambda: os.listdir(secret.parent),
    lambda: os.listdir("/etc"),
    lambda: secret.with_name("new").touch(),
    lambda: token.write_text("mine"),
    lambda: os.kill(os.getppid(), 0),
):
    try:
        forbidden()
    except PermissionError:
        continue
    sys.exit("not confined")
"""

BRIDGE = """
import sys
from pathlib import Path
from framepackd.cluster import bridge
from framepackd import files
root = Path(sys.argv[1])
way = bridge.Way(root / "socket", "render2", "cpu", root / "state/jobs", root / "loras")
assert sorted(bridge.confine(way)) == sorted([root / "loras", root / "other/linked"])
import framepackd.cluster.runs, framepackd.worker.versions
framepackd.worker.versions.versions()
job = root / "state/jobs/1"
(job / "inputs").rename(job / "moved")
files.write_bytes(job / "state-1", b"1")
assert (root / "loras/linked").read_text() == (root / "loras/own").read_text() == "lora"
for name in ("state/framepackd.db", "config.toml", "outbox/video.mp4", "other/secret"):
    for forbidden in (root.joinpath(name).read_bytes, lambda: root.joinpath(name).write_text("mine")):
        try:
            forbidden()
        except PermissionError:
            continue
        sys.exit(f"{name} can be reached")
"""


def test_a_bridge_reaches_the_jobs_and_their_loras_and_neither_database_outbox_nor_configuration(
    tmp_path: Path,
) -> None:
    if not landlock.version():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "state/jobs/1/inputs").mkdir(parents=True)
    for name in ("loras/own", "other/linked"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("lora")
    (tmp_path / "loras/linked").symlink_to(tmp_path / "other/linked")
    (tmp_path / "outbox").mkdir()
    secrets = ("state/framepackd.db", "config.toml", "outbox/video.mp4", "other/secret")
    for name in secrets:
        (tmp_path / name).write_text("secret")
    ran = subprocess.run(
        [sys.executable, "-P", "-c", BRIDGE, tmp_path], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert {(tmp_path / name).read_text() for name in secrets} == {"secret"}


def test_a_link_sees_neither_state_folder_nor_configuration(tmp_path: Path) -> None:
    if landlock.version() < 6:
        pytest.skip("this kernel's Landlock does not keep signals back")
    folder, token, secret = tmp_path / "ray", tmp_path / "token", tmp_path / "state/framepackd.db"
    for made in (folder, secret.parent):
        made.mkdir()
    secret.write_text("secret")
    token.write_text("token")
    variable = next(name for name in link.TRUST_FILES if "TOKEN" in name)
    ran = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *map(str, (folder, token, secret))],
        env={**os.environ, variable: str(token)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert not secret.with_name("new").exists()


def in_ray(address: str, *cards: str, alive: bool = True) -> dict[str, Any]:
    return {
        "NodeName": "render2",
        "NodeManagerAddress": address,
        "Alive": alive,
        "Resources": {f"{link.CARDS}{card}": 1.0 for card in cards},
    }


def test_of_machines_with_one_name_the_living_one_is_listed_and_the_others_are_named() -> None:
    gone, first, again = (in_ray("10.0.0.7", "cuda:0", alive=alive) for alive in (False, True, True))
    second, head = in_ray("10.0.0.8", "cuda:0", "cuda:1"), in_ray("10.0.0.1")
    listed = {"host": "render2", "address": "10.0.0.7", "alive": True, "devices": ["cuda:0"]}
    assert link.listed([gone, first, again]) == [listed | {"others": []}]
    assert link.listed([head, gone, first, second, second]) == [listed | {"others": ["10.0.0.8"]}]
