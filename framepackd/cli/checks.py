"""Draws the checks of this machine and the memory plan in a terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from framepack_core.memory.footprint import GIB
from framepack_core.models.registry import BUNDLED
from framepackd.text import printable

if TYPE_CHECKING:
    from framepack_core.memory.planning import Plan
    from framepackd.machine.check import Check, Forecast


def checks(results: Iterable["Check"]) -> RenderableType:
    """Draw checks: a mark, what was checked, what was found."""
    grid = Table.grid(padding=(0, 2))
    marks = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim"), "warning": ("!", "yellow")}
    for fine, what, found in results:
        grid.add_row(Text(*marks[fine]), Text(what, style="bold"), Text(printable(found), overflow="fold"))
    return grid


PART_NAMES = {
    "core": "transformer, sampling loop",
    "embedders": "transformer, used once a video",
    "text_encoder": "text encoder (Llama)",
    "text_encoder_2": "text encoder (CLIP)",
    "image_encoder": "image encoder (SigLIP)",
    "vae": "VAE",
}


def forecast(found: "Forecast") -> RenderableType:
    """Draw a memory plan: what lives where, and what that takes."""
    plan, card, host = found.plan, found.card, found.host
    published = "" if found.weights.on_disk else ", which is not here: by the published sizes"
    title = Text.assemble(("memory plan", "bold"), f" for {found.model}{published}")
    shown = [] if found.model in BUNDLED else [_places(plan)]  # the toy's parts are all 0.0 GiB
    facts = Table.grid(padding=(0, 2))
    video = found.video
    facts.add_row("largest video", f"{video.width}x{video.height}, latent_window_size {video.window}")
    if card is not None:
        tile = plan.levels[plan.level].tile
        facts.add_row("decoding", f"in tiles of {tile} pixels" if tile else "whole frames")
        facts.add_row(
            "VRAM", f"{plan.vram / GIB:.1f} GiB at the peak, {card.free / GIB:.1f} free: {card.name}"
        )
    mapped = f"; and {plan.mapped / GIB:.1f} of files read in place, as far as there is room"
    facts.add_row(
        "RAM",
        f"{plan.ram / GIB:.1f} GiB at the peak, {host.available / GIB:.1f} available"
        + (mapped if plan.mapped >= GIB / 20 else ""),
    )
    facts.add_row("speed", "a toy: it needs no GPU" if found.model in BUNDLED else plan.speed)
    if found.workers > 1:
        together = found.workers * plan.ram / GIB
        facts.add_row("all devices", f"{found.workers} workers: {together:.1f} GiB of RAM together")
    if found.shortage is not None:
        facts.add_row("[red]too little[/red]", escape(found.shortage))
    return Group(Text(), title, *shown, facts)


def _places(plan: "Plan") -> Table:
    table = Table("part", Column("GiB", justify="right"), "where")
    for part, (size, where) in plan.places.items():
        table.add_row(PART_NAMES[part], f"{size / GIB:.1f}", where)
    return table
