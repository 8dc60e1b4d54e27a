"""Who computes on one machine alone never notices the others: nothing of them is imported."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from framepackd import daemon
from framepackd.settings.config import load_config

code = daemon.run(load_config(Path("config.toml")), once=True)
print(code, *(name for name in sys.modules if name.startswith("framepackd.cluster") or name == "ray"))
"""


def loop(folder: Path, text: str) -> str:
    """Have a daemon in an interpreter of its own go round, and name what it imported of the wing."""
    (folder / "config.toml").write_text(f'state_dir = "state"\n{text}')
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_without_nodes_the_wing_is_not_imported(tmp_path: Path) -> None:
    assert loop(tmp_path, "") == "0"


def test_with_nodes_it_is_and_ray_is_not(tmp_path: Path) -> None:
    imported = loop(tmp_path, f'[cluster]\nnodes = "all"\nsocket = "{tmp_path}/none.sock"\n')
    assert "framepackd.cluster.roll" in imported
    assert "ray" not in imported.split()


def test_neither_a_bridge_nor_a_nodes_end_nor_a_worker_imports_what_keeps_the_queue() -> None:
    """It would be a large part of their start, and of the time until a machine goes on."""
    code = (
        "import sys, framepackd.cluster.bridge, framepackd.cluster.node, framepackd.worker.main\n"
        "import framepackd.worker.video, framepackd.worker.engines\n"
        "print('sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
