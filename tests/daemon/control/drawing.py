"""Draws what status says as a terminal shows it."""

import io
from datetime import UTC, datetime

from rich.console import Console

from framepackd.cli import display
from framepackd.jobs.report import Report


def drawn(report: Report, *, colour: bool = False, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour).print(display.status(report, datetime.now(UTC)))
    return out.getvalue()
