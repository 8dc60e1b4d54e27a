"""Draw the curves of a run: how large the error is after so many CPU seconds.

    python -m training.curves training/curves docs/pictures/training-curves.png

FOLDER holds a curve.jsonl of each stage, as RUN/STAGE/curve.jsonl, or STAGE.jsonl.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageDraw

from training.transformer import STAGES as TRANSFORMER_STAGES

WIDTH, HEIGHT, MARGIN = 300, 170, 34
Entry = dict[str, Any]
STAGES: dict[str, tuple[str, dict[str, Callable[[Entry], float | None]]]] = {
    "vae-linear": ("PSNR, dB", {"held out, 192 px": lambda entry: entry.get("psnr")}),
    "vae-stills": ("PSNR, dB", {"held out, 192 px": lambda entry: entry.get("psnr")}),
    "vae-frames": (
        "PSNR, dB",
        {
            "stills, 192 px": lambda entry: entry["psnr"],
            "encoded frames": lambda entry: entry["psnr_of_frames"][4],
            "between them": lambda entry: entry["psnr_of_frames"][6],
        },
    ),
    **{
        f"transformer-{stage}": (
            "error / that of a still",
            {
                name: lambda entry, name=name: entry["error"].get(name)  # type: ignore[misc] # bound now
                for name in ("pan left", "zoom in", "rotate left", "ripple", "night falls")
            },
        )
        for stage in TRANSFORMER_STAGES
    },
}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd")


def draw(name: str, entries: list[Entry]) -> Image.Image:
    """Draw one stage."""
    unit, lines = STAGES[name]
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    write = ImageDraw.Draw(picture)
    points = {
        label: [(entry["cpu_seconds"], value) for entry in entries if (value := find(entry)) is not None]
        for label, find in lines.items()
    }
    values = sorted(value for line in points.values() for _, value in line)
    low, high = values[0], values[int(0.98 * (len(values) - 1))]  # the first ones may be far away
    # An error beyond that of a still is of no interest.
    low, high = (0.0, min(high, 1.0)) if low < 1 else (math.floor(low), math.ceil(high))
    longest = max(seconds for line in points.values() for seconds, _ in line)
    beside = float(MARGIN)
    for row, (label, line) in enumerate(points.items()):
        places = [
            (
                MARGIN + (WIDTH - MARGIN - 8) * seconds / longest,
                HEIGHT - 20 - (HEIGHT - 58) * (min(value, high) - low) / (high - low),
            )
            for seconds, value in line
        ]
        write.line(places, fill=COLOURS[row], width=2)
        write.text((beside, 20), label, fill=COLOURS[row], font_size=10)
        beside += write.textlength(label, font_size=10) + 8
    write.text((4, 4), f"{name}: {unit}", fill="black", font_size=11)
    write.text((2, 34), f"{high:.3g}", fill="black", font_size=10)
    write.text((2, HEIGHT - 32), f"{low:.3g}", fill="black", font_size=10)
    write.text((WIDTH - 74, HEIGHT - 14), f"{longest} CPU s", fill="black", font_size=10)
    write.line([(MARGIN, 36), (MARGIN, HEIGHT - 20), (WIDTH - 8, HEIGHT - 20)], fill="#888888")
    return picture


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def main(folder: Path, output: Path) -> None:
    """Draw all stages that there are curves of."""
    drawn = []
    for name in STAGES:
        file = next(
            (path for path in (folder / name / "curve.jsonl", folder / f"{name}.jsonl") if path.exists()),
            None,
        )
        if file is not None:
            drawn.append(draw(name, [json.loads(line) for line in file.read_text().splitlines()]))
    columns = 3
    sheet = Image.new("RGB", (columns * WIDTH, math.ceil(len(drawn) / columns) * HEIGHT), "white")
    for number, picture in enumerate(drawn):
        sheet.paste(picture, (number % columns * WIDTH, number // columns * HEIGHT))
    sheet.save(output, optimize=True)


if __name__ == "__main__":
    main()
