"""Put what was trained together as a model's folder, stored in float16.

python -m training.bundle RUN framepack_core/demo_model
"""

import shutil
from pathlib import Path

import click
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from training.transformer import CONFIG, STAGES
from training.vae import LATENT_CHANNELS, build


def build_vae(run: Path) -> torch.nn.Module:
    """Give the VAE, whose latents have mean 0 and deviation 1 in each channel, and no noise."""
    vae = build()
    trained = next(
        path for name in ("frames", "stills", "linear") if (path := run / f"vae-{name}.pt").exists()
    )
    vae.load_state_dict(torch.load(trained))
    mean, std = (values.flatten() for values in torch.load(run / "latents.pt"))
    with torch.no_grad():
        out, back = vae.quant_conv, vae.post_quant_conv
        out.weight[:LATENT_CHANNELS] /= std.view(-1, 1, 1, 1, 1)
        out.bias[:LATENT_CHANNELS] = (out.bias[:LATENT_CHANNELS] - mean) / std
        out.weight[LATENT_CHANNELS:], out.bias[LATENT_CHANNELS:] = 0, -20
        back.bias += back.weight[:, :, 0, 0, 0] @ mean
        back.weight *= std.view(1, -1, 1, 1, 1)
    return vae


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--stage", type=click.Choice(list(STAGES)), default="whole")
def main(run: Path, folder: Path, stage: str) -> None:
    """Write the model of RUN, after a stage of its transformer, to FOLDER, over the one that is there."""
    shutil.copytree(run / "text", folder, dirs_exist_ok=True)
    build_vae(run).half().save_pretrained(folder / "base/vae")
    transformer = HunyuanVideoFramepackTransformer3DModel(**CONFIG)
    transformer.load_state_dict(torch.load(run / f"transformer-{stage}.pt"))
    transformer.half().save_pretrained(folder / "transformer")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{folder}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
