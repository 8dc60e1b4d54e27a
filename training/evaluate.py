"""Measure a model on photographs that it was never trained on, by framepack_core itself.

    python -m training.evaluate framepack_core/demo_model PICTURES figures.json [--kind f1] [--size 128]

Of each photograph and motion a video of two sections is made. Its frames 25 to 36 (the last third of the
first section) and 61 to 72 are compared with those of the true motion, of the picture standing still, and
of every other motion. Of the first ones the true frames are compared with themselves after the VAE, too: no
video can be much better than that. Paraphrases, none of which was trained on, count as understood if their
motion is the nearest one; sentences that name no motion, if the picture sways or stands still.
"""

import json
import multiprocessing
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from PIL import Image

from framepack_core.engine import Clip, Engine
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from framepack_core.request import Request
from framepack_core.sections import Kind, chronological
from training.crops import centre
from training.motions import MOTIONS, OTHERWISE, render
from training.paraphrases import PARAPHRASES
from training.pictures import load
from training.run import psnr

THIRDS = {"first section": slice(25, 37), "second section": slice(61, 73)}
STEPS = 4


def engine_for(folder: Path, kind: Kind) -> Engine:
    """Load a model's folder, to go in one of the two directions."""
    sources = (Source(str(folder / part)) for part in ("transformer", "base", "image_encoder"))
    return Engine.load(ModelSpec("demo", kind, *sources, buckets=BUILT_IN["demo"].buckets), "cpu", "float32")


def make(
    engine: Engine, picture: torch.Tensor, prompt: str, sections: int, steps: int = STEPS
) -> torch.Tensor:
    """Make a video of a picture (3, H, W): frames (T, 3, H, W) in [-1, 1]."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "picture.png"
        Image.fromarray(to_pixels(picture)).save(file)
        request = Request(
            image=file,
            prompt=prompt,
            seconds=1.2 * sections,
            steps=steps,
            width=picture.shape[2],
            height=picture.shape[1],
        )
        clips = [event.frames for event in engine.generate(request) if isinstance(event, Clip)]
    frames = np.concatenate(chronological(engine.models.spec.kind, clips))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(picture: torch.Tensor) -> Any:
    """Give a picture (3, H, W) in [-1, 1] as (H, W, 3), uint8."""
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def truths(picture: torch.Tensor, frames: int) -> dict[str, torch.Tensor]:
    """Give what each motion is, and the picture standing still."""
    times = torch.arange(frames)
    true = {motion: render(picture, motion, times) for motion in (*MOTIONS, OTHERWISE)}
    return true | {"still": picture[None].expand(frames, -1, -1, -1)}


def nearest(made: torch.Tensor, true: dict[str, torch.Tensor], frames: slice) -> str:
    """Say which motion some frames of a video are nearest to."""
    return max(true, key=lambda motion: psnr(made[frames], true[motion][frames]))


_engine: Engine  # of a process that measures


def _load(folder: Path, kind: Kind) -> None:
    """Load the model, in a process that measures."""
    global _engine
    torch.set_num_threads(1)
    _engine = engine_for(folder, kind)


def measure_motions(photo: torch.Tensor, size: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Give, by motion and third, what came of a picture."""
    picture = centre(photo, size)
    true = truths(picture, 73)
    figures: dict[str, dict[str, Any]] = defaultdict(dict)
    for motion in MOTIONS:
        made = make(_engine, picture, motion, 2)
        first = THIRDS["first section"]
        through_vae = _through_vae(true[motion][first.start - 5 : first.stop : 4])[5:]
        for third, frames in THIRDS.items():
            figures[motion][third] = {
                "psnr": round(psnr(made[frames], true[motion][frames]), 2),
                "still": round(psnr(true["still"][frames], true[motion][frames]), 2),
                "nearest": nearest(made, true, frames),
            }
        figures[motion]["first section"]["vae"] = round(psnr(through_vae, true[motion][first]), 2)
    return figures


@torch.no_grad()
def _through_vae(known: torch.Tensor) -> torch.Tensor:
    """Encode every fourth frame (T, 3, H, W), and decode all, (4 * T - 3, 3, H, W)."""
    vae = _engine.models.vae
    latents = [vae.encode(frame[None, :, None]).latent_dist.mode() for frame in known]
    decoded: torch.Tensor = vae.decode(torch.cat(latents, 2)).sample
    return decoded[0].transpose(0, 1)


def understood(photo: torch.Tensor, size: int, text: str) -> str:
    """Say which motion comes of a sentence."""
    picture = centre(photo, size)
    return nearest(make(_engine, picture, text, 1), truths(picture, 37), THIRDS["first section"])


@torch.no_grad()
def vae_psnr(photo: torch.Tensor) -> float:
    """Give the PSNR of a picture of 192 pixels, encoded and decoded."""
    picture, vae = centre(photo, 192), _engine.models.vae
    latents = vae.encode(picture[None, :, None]).latent_dist.mean
    return round(psnr(vae.decode(latents).sample[:, :, 0], picture[None]), 2)


def mean(values: Sequence[float]) -> float:
    """Give the mean."""
    return sum(values) / len(values)


def table(figures: dict[str, Any]) -> str:
    """Lay the figures out, as Markdown."""
    lines = [
        f"{len(figures['photographs'])} photographs, {figures['size']} px, `{figures['kind']}`, "
        f"{figures['steps']} steps; PSNR in dB",
        "",
        "| motion | frames | PSNR | of the VAE | of a still | gain | least gain | right one nearest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for motion, thirds in figures["motions"].items():
        for third, rows in thirds.items():
            gains = [row["psnr"] - row["still"] for row in rows]
            cells = (
                motion,
                "25-36" if third == "first section" else "61-72",
                f"{mean([row['psnr'] for row in rows]):.1f}",
                f"{mean([row['vae'] for row in rows]):.1f}" if "vae" in rows[0] else "",
                f"{mean([row['still'] for row in rows]):.1f}",
                f"{mean(gains):+.1f}",
                f"{min(gains):+.1f}",
                f"{100 * mean([row['nearest'] == motion for row in rows]):.0f} %",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("pictures", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(["framepack", "f1"]), default="f1")
@click.option("--size", default=128)
@click.option("--photographs", type=int, help="So many of them; else all.")
@click.option("--paraphrases", default=2, help="Photographs that each paraphrase is tried on.")
@click.option("--processes", default=1)
def main(
    model: Path,
    pictures: Path,
    output: Path,
    kind: str,
    size: int,
    photographs: int | None,
    paraphrases: int,
    processes: int,
) -> None:
    """Measure MODEL, write the figures to OUTPUT, and print them."""
    photos = dict(list(load(pictures, held_out=True).items())[:photographs])
    some = list(photos.values())[:paraphrases]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawned, _load, (model, cast("Kind", kind))) as pool:
        vae = pool.map(vae_psnr, photos.values())
        moved = [pool.submit(measure_motions, photo, size) for photo in photos.values()]
        said = {
            (motion, text): [pool.submit(understood, photo, size, text) for photo in some]
            for motion, texts in PARAPHRASES.items()
            for text in texts
        }
        figures: dict[str, Any] = {
            "kind": kind,
            "size": size,
            "steps": STEPS,
            "photographs": list(photos),
            "vae_psnr_at_192": list(vae),
            "motions": {},
        }
        for number, future in enumerate(moved, 1):
            for motion, thirds in future.result().items():
                for third, row in thirds.items():
                    figures["motions"].setdefault(motion, {}).setdefault(third, []).append(row)
            click.echo(f"{number} of {len(moved)} photographs", err=True)
        found = {key: [future.result() for future in futures] for key, futures in said.items()}
    figures["paraphrases"] = [
        {"motion": motion, "text": text, "became": motions} for (motion, text), motions in found.items()
    ]
    output.write_text(json.dumps(figures, indent=1))
    report(figures)


def report(figures: dict[str, Any]) -> None:
    """Print the figures."""
    click.echo(table(figures))
    psnrs = figures["vae_psnr_at_192"]
    click.echo(f"\nVAE at 192 px: {mean(psnrs):.2f} dB, {min(psnrs):.2f} to {max(psnrs):.2f}")
    said = figures["paraphrases"]
    named = [entry for entry in said if entry["motion"] != OTHERWISE]
    for title, entries in ("paraphrases", named), ("no motion named", [e for e in said if e not in named]):
        right = [_is_right(entry["motion"], motion) for entry in entries for motion in entry["became"]]
        if right:
            click.echo(f"\n{title}: {100 * mean(right):.1f} % of {len(right)} ({len(entries)} sentences)")
        for entry in entries:
            if not all(_is_right(entry["motion"], motion) for motion in entry["became"]):
                click.echo(f"- {entry['motion']}: {entry['text']!r} became {', '.join(entry['became'])}")


def _is_right(wanted: str, became: str) -> bool:
    """Say whether a motion is what a sentence wanted."""
    return became == wanted or (wanted == OTHERWISE and became == "still")


if __name__ == "__main__":
    main()
