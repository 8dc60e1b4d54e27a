"""A link, which unpacks what nodes send by Ray: it has its code and Ray's folder, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

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
