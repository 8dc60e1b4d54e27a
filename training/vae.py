"""Train the VAE: AutoencoderKLHunyuanVideo, small.

    python -m training.vae linear PICTURES RUN     a linear skeleton, then modules that compute the same
    python -m training.vae stills PICTURES RUN     the decoder, on single pictures
    python -m training.vae frames PICTURES RUN     the decoder, between the frames that are encoded

Each goes on from the one before, and from its own last checkpoint in RUN.

The encoder looks at every fourth frame alone: of its kernels only the last tap in time is not zero. So a
start picture's latents are like those of a video, and a moved picture's latents are moved ones. A network
that begins at random cannot learn this in minutes: its last normalization hides brightness and contrast. So
a linear one is learnt first, and put into the real modules in a way that these compute exactly the same:
every channel x stands beside -x, for which silu(x) - silu(-x) = x, and beside two constants of opposite
sign that are so large that the normalization divides by nearly the same number whatever the picture.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as diffusers_vae
from torch import nn
from torch.nn import functional

from training import motions
from training.crops import Crops, centre
from training.pictures import load
from training.run import Run, psnr

CHANNELS = (16, 32, 64, 64)
LATENT_CHANNELS = 16
ENCODER_PAIRS, DECODER_PAIRS = 31, 7  # with their opposites and the two constants: all channels of the tails
CONSTANT = 30.0
TAILS = ("conv_norm_out", "conv_out")
EVERY_MOTION = (*motions.MOTIONS, motions.OTHERWISE)


def build() -> AutoencoderKLHunyuanVideo:
    """Give a VAE with diffusers' weights."""
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def see_stills_in_2d(taps: slice) -> None:
    """Have single frames convolved in two dimensions, which is fast, by the sum of these taps in time.

    A single frame is its own past: all taps see it. As long as none but the last is to be learnt, that one is
    enough.
    """
    convolution = diffusers_vae.HunyuanVideoCausalConv3d
    whole = convolution.forward

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[2] != 1:
            return whole(self, hidden_states)
        padding = self.time_causal_padding[:4]
        flat = functional.pad(hidden_states[:, :, 0], padding, mode="replicate")
        kernel = self.conv.weight[:, :, taps].sum(2)
        return functional.conv2d(flat, kernel, self.conv.bias, stride=self.conv.stride[1:])[:, :, None]

    convolution.forward = forward


def begin(vae: AutoencoderKLHunyuanVideo) -> None:
    """Set the weights that the linear skeleton begins with."""
    for module in vae.modules():
        if isinstance(module, diffusers_vae.HunyuanVideoCausalConv3d):
            kernel = module.conv.weight
            kernel[:, :, :-1] = 0
            kernel[:, :, -1].normal_(0, (kernel.shape[1] * kernel.shape[3] * kernel.shape[4]) ** -0.5)
            module.conv.bias.zero_()
    for module in vae.modules():
        if isinstance(module, diffusers_vae.HunyuanVideoResnetBlockCausal3D):
            module.conv2.conv.weight.zero_()


def encode(vae: AutoencoderKLHunyuanVideo, pictures: torch.Tensor) -> torch.Tensor:
    """Encode pictures (B, 3, H, W) each by itself: (B, 16, 1, h, w)."""
    return vae.quant_conv(vae.encoder(pictures[:, :, None]))[:, :LATENT_CHANNELS]


def decode(vae: AutoencoderKLHunyuanVideo, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, 16, T, h, w): (B, 3, 4 * T - 3, H, W)."""
    decoded: torch.Tensor = vae.decoder(vae.post_quant_conv(latents))
    return decoded


class Skeleton(nn.Module):
    """The linear part of a VAE: its convolutions that change the size or the number of channels."""

    def __init__(self, vae: AutoencoderKLHunyuanVideo) -> None:
        """Take the modules out of a VAE."""
        super().__init__()
        self.vae = vae
        last = vae.decoder.up_blocks[-1].resnets[0]
        for index, keep in ((0, ENCODER_PAIRS), (1, DECODER_PAIRS)):
            convolution = (
                vae.encoder.down_blocks[2].downsamplers[0].conv if index == 0 else last.conv_shortcut
            )
            self.register_buffer(
                f"kept_{index}", (torch.arange(convolution.conv.out_channels) < keep).float()
            )

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Encode pictures (B, 3, H, W): (B, 16, 1, h, w)."""
        encoder = self.vae.encoder
        hidden = encoder.conv_in(pictures[:, :, None])
        for block in encoder.down_blocks:
            hidden = self._straight(block.resnets, hidden)
            for sampler in block.downsamplers or ():
                hidden = sampler(hidden)
        hidden = hidden * self.kept_0.view(1, -1, 1, 1, 1)
        return self.vae.quant_conv(encoder.conv_out(hidden))[:, :LATENT_CHANNELS]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, 16, 1, h, w): (B, 3, 1, H, W)."""
        decoder = self.vae.decoder
        hidden = decoder.conv_in(self.vae.post_quant_conv(latents))
        for block in decoder.up_blocks:
            hidden = self._straight(block.resnets, hidden)
            for sampler in block.upsamplers or ():
                hidden = sampler(hidden)
        decoded: torch.Tensor = decoder.conv_out(hidden * self.kept_1.view(1, -1, 1, 1, 1))
        return decoded

    @staticmethod
    def _straight(resnets: Any, hidden: torch.Tensor) -> torch.Tensor:
        for resnet in resnets:
            if resnet.conv_shortcut is not None:
                hidden = resnet.conv_shortcut(hidden)
        return hidden

    @torch.no_grad()
    def install(self) -> None:
        """Have the real modules compute the same."""
        encoder, decoder = self.vae.encoder, self.vae.decoder
        sampler, last = encoder.down_blocks[2].downsamplers[0].conv, decoder.up_blocks[-1].resnets
        self._pair(sampler, ENCODER_PAIRS, encoder.mid_block.resnets[-1], encoder)
        self._pair(last[0].conv_shortcut, DECODER_PAIRS, last[1], decoder)

    @staticmethod
    def _pair(convolution: Any, pairs: int, last: Any, half: Any) -> None:
        kernel, bias = convolution.conv.weight, convolution.conv.bias
        kernel[pairs : 2 * pairs], bias[pairs : 2 * pairs] = -kernel[:pairs], -bias[:pairs]
        kernel[2 * pairs :], bias[2 * pairs :] = 0, 0
        last.conv2.conv.weight.zero_()
        last.conv2.conv.bias.zero_()
        last.conv2.conv.bias[2 * pairs : 2 * pairs + 2] = torch.tensor([CONSTANT, -CONSTANT])
        half.conv_norm_out.weight.fill_(1)
        half.conv_norm_out.bias.zero_()
        # What the normalization divides by, if nothing but the constants were there.
        divisor = CONSTANT * math.sqrt(2 / (2 * pairs + 2))
        out = half.conv_out.conv.weight
        out[:, :pairs] *= divisor
        out[:, pairs : 2 * pairs] = -out[:, :pairs]
        out[:, 2 * pairs :] = 0


def blurs(decoded: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Say how far neighbouring pixels differ in another way than they should."""
    error = decoded - wanted
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    return across + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()


def loss_of(decoded: torch.Tensor, wanted: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Weigh up errors of pixels, of edges, and latents that grow without need."""
    error = decoded - wanted
    large = (latents.pow(2).mean() - 1).clamp(min=0)
    return 0.5 * error.abs().mean() + 4 * error.pow(2).mean() + 0.3 * blurs(decoded, wanted) + 0.05 * large


def held_out_psnr(
    encode_one: Callable[[torch.Tensor], torch.Tensor],
    decode_one: Callable[[torch.Tensor], torch.Tensor],
    pictures: torch.Tensor,
) -> float:
    """Give the mean PSNR of pictures (B, 3, H, W), in dB."""
    with torch.no_grad():
        return sum(
            psnr(decode_one(encode_one(picture[None]))[:, :, 0], picture[None]) for picture in pictures
        ) / len(pictures)


@click.group()
def main() -> None:
    """Train the VAE, stage by stage."""
    torch.manual_seed(0)
    random.seed(0)
    see_stills_in_2d(slice(-1, None))


arguments = [
    click.argument("pictures", type=click.Path(path_type=Path)),
    click.argument("folder", type=click.Path(path_type=Path)),
    click.option("--iterations", type=int, required=True),
]


def with_arguments(command: Any) -> Any:
    """Give a command what all stages take."""
    for argument in reversed(arguments):
        command = argument(command)
    return command


@main.command()
@with_arguments
def linear(pictures: Path, folder: Path, iterations: int) -> None:
    """Learn the linear skeleton."""
    crops = Crops(list(load(pictures, held_out=False).values()), (128, 192, 256, 384))
    held_out = torch.stack([centre(picture, 192) for picture in load(pictures, held_out=True).values()])
    vae = build()
    with torch.no_grad():
        begin(vae)
    skeleton = Skeleton(vae)
    run = Run(folder / "vae-linear", skeleton, torch.optim.Adam(skeleton.parameters(), betas=(0.9, 0.95)))
    for iteration in run.to(iterations, rate=3e-3, warm_up=30):
        wanted = crops.many(8, 64)
        latents = skeleton.encode(wanted)
        decoded = skeleton.decode(latents + 0.02 * torch.randn_like(latents))[:, :, 0]
        run.step(loss_of(decoded, wanted, latents))
        if iteration % 250 == 0:
            run.note(psnr=held_out_psnr(skeleton.encode, skeleton.decode, held_out))
    torch.save(skeleton.state_dict(), folder / "skeleton.pt")
    skeleton.install()
    run.note(installed=held_out_psnr(lambda x: encode(vae, x), lambda z: decode(vae, z), held_out))
    torch.save(vae.state_dict(), folder / "vae-linear.pt")


def _rates(vae: AutoencoderKLHunyuanVideo, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Part the weights: what lies behind the last normalization is large, and must not jump."""
    named = [(name, weight) for name, weight in vae.named_parameters() if name.startswith(names)]
    for tail, scale in ((True, 0.02), (False, 1.0)):
        chosen = [weight for name, weight in named if any(part in name for part in TAILS) == tail]
        yield {"params": chosen, "scale": scale}


@main.command()
@with_arguments
def stills(pictures: Path, folder: Path, iterations: int) -> None:
    """Train the decoder on single pictures; the encoder stays linear, so that moving latents stays simple."""
    crops = Crops(list(load(pictures, held_out=False).values()), (128, 192, 256, 384))
    held_out = torch.stack([centre(picture, 192) for picture in load(pictures, held_out=True).values()])
    vae = build()
    vae.load_state_dict(torch.load(folder / "vae-linear.pt"))
    skeleton = Skeleton(build())
    skeleton.load_state_dict(torch.load(folder / "skeleton.pt"))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    groups = [*_rates(vae, ("decoder", "post_quant_conv"))]
    run = Run(folder / "vae-stills", vae, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0))
    for iteration in run.to(iterations, rate=7e-4, warm_up=50):
        wanted = crops.many(*((4, 96) if iteration % 4 == 0 else (8, 64)))
        with torch.no_grad():
            latents = skeleton.encode(wanted)
        decoded = decode(vae, latents + 0.03 * torch.randn_like(latents))[:, :, 0]
        run.step(loss_of(decoded, wanted, latents))
        if iteration % 500 == 0:
            with run.averaged():
                run.note(psnr=held_out_psnr(lambda x: encode(vae, x), lambda z: decode(vae, z), held_out))
    with run.averaged():
        torch.save(vae.state_dict(), folder / "vae-stills.pt")


def exactly(module: nn.Module) -> None:
    """Have a module compute in float32 under autocast: it divides by much, and what is rounded is large."""
    whole = module.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return whole(hidden.float())

    module.forward = forward


def clip_of(crops: Crops, size: int, frames: int) -> torch.Tensor:
    """Draw a moving piece of a picture, or one that stands still: (T, 3, size, size)."""
    piece = crops.one(size)
    if random.random() < 0.1:
        return piece[None].expand(frames, -1, -1, -1)
    first = random.choice((0, 0, 8, 16, 40))
    times = torch.arange(first, first + frames)
    return motions.render(piece, random.choice(EVERY_MOTION), times, speed=random.choice((1, 1, 0.5, 1.5)))


@main.command()
@with_arguments
def frames(pictures: Path, folder: Path, iterations: int) -> None:
    """Train the decoder to make the frames between those that were encoded."""
    crops = Crops(list(load(pictures, held_out=False).values()), (96, 128, 192, 256))
    photographs = list(load(pictures, held_out=True).values())
    held_out = [centre(picture, 64) for picture in photographs]
    large = torch.stack([centre(picture, 192) for picture in photographs])
    times = torch.arange(9)
    chosen = ("pan left", "tilt up", "zoom in", "rotate right", "ripple")
    moving = [motions.render(piece, chosen[row % 5], 8 + times) for row, piece in enumerate(held_out)]
    vae, skeleton = build(), Skeleton(build())
    vae.load_state_dict(torch.load(folder / "vae-stills.pt"))
    skeleton.load_state_dict(torch.load(folder / "skeleton.pt"))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    groups = [*_rates(vae, ("decoder", "post_quant_conv"))]
    run = Run(folder / "vae-frames", vae, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0))

    see_stills_in_2d(slice(None))
    for tail in (vae.decoder.conv_norm_out, vae.decoder.conv_act, vae.decoder.conv_out):
        exactly(tail)

    def decoded(clips: torch.Tensor, noise: float) -> torch.Tensor:
        """Encode every fourth of frames (B, 9, 3, H, W), and decode all of them."""
        with torch.no_grad():
            latents = skeleton.encode(clips[:, ::4].flatten(0, 1))[:, :, 0].unflatten(0, (len(clips), -1))
        latents = latents.transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            return decode(vae, latents + noise * torch.randn_like(latents)).float().transpose(1, 2)

    def decoded_stills(pictures: torch.Tensor, noise: float) -> torch.Tensor:
        """Encode pictures (B, 3, H, W), and decode them."""
        with torch.no_grad():
            latents = skeleton.encode(pictures)
        return decode(vae, latents + noise * torch.randn_like(latents))[:, :, 0]

    for iteration in run.to(iterations, rate=7e-4, warm_up=50):
        clips = torch.stack([clip_of(crops, 64, 9) for _ in range(2)]).clamp(-1, 1)
        loss = loss_of(decoded(clips, random.uniform(0, 0.06)), clips, torch.zeros(1))
        if iteration % 2 == 0:  # so that it does not forget what it knew about stills
            wanted = crops.many(4, 96)
            loss = loss + loss_of(decoded_stills(wanted, random.uniform(0, 0.03)), wanted, torch.zeros(1))
        run.step(loss)
        if iteration % 250 == 0:
            with run.averaged(), torch.no_grad():
                made = torch.cat([decoded(clip[None], 0.0) for clip in moving])
                figures = [psnr(made[:, frame], torch.stack(moving)[:, frame]) for frame in range(9)]
                run.note(
                    psnr=held_out_psnr(skeleton.encode, lambda z: decode(vae, z), large),
                    psnr_of_frames=[round(figure, 2) for figure in figures],
                )
    with run.averaged():
        torch.save(vae.state_dict(), folder / "vae-frames.pt")


if __name__ == "__main__":
    main()
