"""Using framepack_core from Python, as docs/usage.md shows."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_prints_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    """Libraries announce what they load, and advise to install what is not needed."""
    (example,) = re.findall(
        r"```python\n(from pathlib.*?)```", (ROOT / "docs/usage.md").read_text(), re.DOTALL
    )
    smaller = example.replace("seconds=1", "seconds=1, steps=1, width=64, height=64")
    smaller = smaller.replace("lake.mp4", str(tmp_path / "lake.mp4"))
    done = subprocess.run(
        [sys.executable, "-c", smaller], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"0 \(37, \d+, \d+, 3\)\n", done.stdout)
    assert (tmp_path / "lake.mp4").stat().st_size > 0
