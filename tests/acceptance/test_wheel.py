"""The wheel, as a user installs it: all wings, and nothing of what only tests need."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGED = (
    *("framepack_core", "framepackd", "systemd"),
    *("setup.py", "pyproject.toml", "config.example.toml", "README.md", "LICENSE"),
)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_wheel_holds_all_wings_and_makes_a_video_without_what_tests_need(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(ROOT))
        for package in ("framepack_core", "framepackd")
        for path in (ROOT / package).rglob("*.py")
    }
    units = {f"framepackd/{path.relative_to(ROOT)}" for path in (ROOT / "systemd").rglob("*.service")}
    assert modules | units <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "training/"))]
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv/bin"
    pip = [programs / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", wheel], check=True)
    packages = subprocess.run([*pip, "list"], check=True, capture_output=True, text=True).stdout
    assert not [name for name in ("pytest", "mypy", "gradio", "bitsandbytes") if name in packages]
    program = programs / "framepackd"
    for made in ("man/man1/framepackd-status.1", "bash-completion/completions/framepackd"):
        assert (tmp_path / "venv/share" / made).stat().st_size > 300
    said = subprocess.run([program, "--help"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "status" in said.stdout
    config = tmp_path / "config.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\nmodel = "demo"\n')
    subprocess.run([program, "check", "--no-gpu", "--config", config], check=True, cwd=tmp_path)
    made = subprocess.run([program, "demo"], check=True, capture_output=True, text=True, cwd=tmp_path)
    video = tmp_path / made.stdout.splitlines()[-1]
    assert video.suffix == ".mp4"
    assert video.stat().st_size > 1000
    assert "bitsandbytes" not in made.stdout + made.stderr
