"""What was made by others lies here unchanged, with where it comes from and under which licence."""

import hashlib
import re
from pathlib import Path

import framepackd.web

STATIC = Path(framepackd.web.__file__).parent / "static"


def test_the_vendored_file_is_the_one_that_is_named() -> None:
    file = STATIC / "htmx.min.js"
    told = file.with_name(f"{file.name.partition('.')[0]}.txt").read_text()
    found = re.search(r"SHA-256: ([0-9a-f]{64})", told)
    assert found
    assert hashlib.sha256(file.read_bytes()).hexdigest() == found[1]
    assert re.search("Zero-Clause BSD", told)
