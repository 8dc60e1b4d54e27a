"""Where a running job is, in words."""

from typing import Any


def stage(job: dict[str, Any]) -> list[str]:
    """Say in words which clip of a chain, which section of it and which step a job is at."""
    sections = job["sections"] // job["clips"]
    before, section = divmod(job["section"] - 1, sections)
    return [
        *([f"clip {before + 1}/{job['clips']}"] if job["clips"] > 1 else []),
        f"section {section + 1}/{sections}",
        "decoding" if job["step"] == job["steps"] else f"step {job['step']}/{job['steps']}",
    ]
