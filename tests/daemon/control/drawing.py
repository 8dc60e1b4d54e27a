"""Draws what status says as a terminal shows it."""

import io
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from framepackd.cli import display


def drawn(report: dict[str, Any], *, colour: bool = False, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour).print(display.status(report, datetime.now(UTC)))
    return out.getvalue()
