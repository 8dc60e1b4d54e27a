"""Draws the other machines that compute in a terminal, and what a check of one has found."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from framepackd.text import clock, printable
from framepackd.worker import versions

if TYPE_CHECKING:
    from framepackd.jobs.report import CardReport, FleetReport, NodeReport
    from framepackd.machine.check import Check
    from framepackd.settings.config import Config
