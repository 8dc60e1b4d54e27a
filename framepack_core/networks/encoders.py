"""Encodes prompts with Llama and CLIP, and the picture with SigLIP."""

import re
import unicodedata
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import DEFAULT_PROMPT_TEMPLATE
from PIL import Image

from framepack_core.errors import ModelError
from framepack_core.media.pictures import Picture, resize
from framepack_core.prompts import Cut, first_words

if TYPE_CHECKING:
    from transformers import (
        CLIPTextModel,
        CLIPTokenizer,
        LlamaModel,
        PreTrainedTokenizerFast,
        SiglipImageProcessorPil,
        SiglipVisionModel,
    )

TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]
TEMPLATE_PREFIX = TEMPLATE.split("{}")[0]
TEMPLATE_TOKENS: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # of the prefix, BOS included: 95
MAX_PROMPT_TOKENS = 256
MAX_POOLED_TOKENS = 77  # begin and end included
PADDED_PROMPT_TOKENS = 512  # length FramePack was trained with; rows past the prompt are masked
TEXT_LAYER = -3  # counted in hidden_states: the output of the last layer but two, before the final norm


@dataclass(frozen=True)
class TextConditioning:
    """A prompt as the transformer takes it."""

    prompt_embeds: torch.Tensor  # (1, 512, C)
    prompt_embeds_mask: torch.Tensor  # (1, 512), bool, true for the prompt's own rows
    pooled_prompt_embeds: torch.Tensor  # (1, P)
    cuts: tuple[Cut, ...] = ()  # by the encoders that it is too long for

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextConditioning":
        """Move everything and cast what is not the mask."""
        return replace(
            self,
            prompt_embeds=self.prompt_embeds.to(device, dtype),
            prompt_embeds_mask=self.prompt_embeds_mask.to(device),
            pooled_prompt_embeds=self.pooled_prompt_embeds.to(device, dtype),
        )


def encode_prompt(
    prompt: str,
    text_encoder: "LlamaModel",
    tokenizer: "PreTrainedTokenizerFast",
    text_encoder_2: "CLIPTextModel",
    tokenizer_2: "CLIPTokenizer",
    device: torch.device,
) -> TextConditioning:
    """Encode a prompt, verbatim, with Llama (tokens) and CLIP (pooled); their dtype, on the CPU.

    ``device``: where they compute.
    """
    ids, mask = tokenize_llama(prompt, tokenizer)
    valid = int(mask.sum())
    output = text_encoder(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        output_hidden_states=True,
        use_cache=False,
    )
    embeds = output.hidden_states[TEXT_LAYER][:, TEMPLATE_TOKENS:valid]
    pooled = text_encoder_2(tokenize_clip(prompt, tokenizer_2).to(device)).pooler_output
    cuts = (cut_llama(prompt, tokenizer), cut_clip(prompt, tokenizer_2))
    return replace(pad_prompt_embeds(embeds.cpu(), pooled.cpu()), cuts=tuple(filter(None, cuts)))


def pad_prompt_embeds(
    embeds: torch.Tensor, pooled: torch.Tensor, length: int = PADDED_PROMPT_TOKENS
) -> TextConditioning:
    """Pad or cut prompt embeds (1, N, C) to ``length`` rows and say in a mask which rows are real."""
    rows = min(embeds.shape[1], length)
    padded = embeds.new_zeros(embeds.shape[0], length, embeds.shape[2])
    padded[:, :rows] = embeds[:, :rows]
    mask = torch.zeros(embeds.shape[0], length, dtype=torch.bool, device=embeds.device)
    mask[:, :rows] = True
    return TextConditioning(padded, mask, pooled)


def tokenize_llama(prompt: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[torch.Tensor, torch.Tensor]:
    """Give token ids and attention mask, each (1, 351), of the prompt inside the template."""
    tokens = tokenizer(
        TEMPLATE.format(prompt),
        padding="max_length",
        max_length=MAX_PROMPT_TOKENS + TEMPLATE_TOKENS,
        truncation=True,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return tokens["input_ids"], tokens["attention_mask"]


def cut_llama(prompt: str, tokenizer: "PreTrainedTokenizerFast") -> Cut | None:
    """Say what ``tokenize_llama`` leaves out of a prompt; None if that is none of its words."""
    told = tokenizer(TEMPLATE.format(prompt), return_offsets_mapping=True, verbose=False)
    begin, end = len(TEMPLATE_PREFIX), len(TEMPLATE_PREFIX) + len(prompt)
    starts = [start - begin for start, _ in told["offset_mapping"][TEMPLATE_TOKENS:] if begin <= start < end]
    return _cut(prompt, "llama", starts, MAX_PROMPT_TOKENS)


def tokenize_clip(prompt: str, tokenizer: "CLIPTokenizer") -> torch.Tensor:
    """Give token ids (1, 77)."""
    tokens = tokenizer(
        _clean_for_clip(prompt),
        padding="max_length",
        max_length=MAX_POOLED_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = tokens["input_ids"]
    return ids


def cut_clip(prompt: str, tokenizer: "CLIPTokenizer") -> Cut | None:
    """Say what ``tokenize_clip`` leaves out of a prompt; None if that is none of its words."""
    cleaned = _clean_for_clip(prompt)
    told = tokenizer(cleaned, return_offsets_mapping=True, verbose=False)
    # Cleaning puts in spaces and takes out what is not kept: all other characters are in both.
    places = [place for place, c in enumerate(prompt) if _kept_for_clip(c) and not c.isspace()]
    passed = list(accumulate((not c.isspace() for c in cleaned), initial=0))
    starts = [places[passed[start]] for start, _ in told["offset_mapping"][1:-1]]
    return _cut(prompt, "clip", starts, MAX_POOLED_TOKENS - 2)


def _cut(prompt: str, encoder: Literal["llama", "clip"], starts: list[int], most: int) -> Cut | None:
    """Say what is left out where tokens begin at ``starts`` in a prompt and ``most`` of them are taken."""
    dropped = first_words(prompt, starts[most]) if len(starts) > most else ""
    return Cut(prompt, encoder, len(starts), most, dropped) if dropped else None


# Blocks whose characters the tokenizer that FramePack was published with treated as words of their own.
_IDEOGRAPHS = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


def _clean_for_clip(prompt: str) -> str:
    """Prepare a prompt as the slow CLIP tokenizer of transformers 4 did, which transformers 5 dropped.

    Without it Japanese and Chinese prompts, and those with zero-width characters, get other token ids.
    """
    return _IDEOGRAPHS.sub(r" \1 ", "".join(filter(_kept_for_clip, prompt)))


def _kept_for_clip(character: str) -> bool:
    return character in "\t\n\r" or unicodedata.category(character) not in ("Cc", "Cf")


def verify_prompt_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Check that the template's prefix is the 95 tokens that are cut off behind the text encoder.

    A tokenizer class that does not fit the files loses the spaces of every prompt without an error.

    Raises:
        ModelError: it is not.
    """
    ids = tokenizer(TEMPLATE_PREFIX)["input_ids"]
    if len(ids) != TEMPLATE_TOKENS:
        raise ModelError(
            f"the tokenizer in {tokenizer.name_or_path} turns the prompt template into {len(ids)} tokens, "
            f"not {TEMPLATE_TOKENS}: these are not HunyuanVideo's tokenizer files; download them again"
        )
    if ids[0] != tokenizer.bos_token_id or tokenizer.padding_side != "right":
        raise ModelError(
            f"the tokenizer in {tokenizer.name_or_path} starts with token {ids[0]} (not BOS, "
            f"{tokenizer.bos_token_id}) or pads on the {tokenizer.padding_side} (not right): "
            "these are not HunyuanVideo's tokenizer files; download them again"
        )


def encode_image(
    picture: Picture, image_encoder: "SiglipVisionModel", processor: "SiglipImageProcessorPil"
) -> torch.Tensor:
    """Encode the cropped uint8 picture (H, W, 3) with SigLIP: (1, tokens, C), normed, on the CPU."""
    size, resample = processor.size, Image.Resampling(processor.resample)
    resized = resize(
        picture, (size["height"], size["width"]), resample=resample
    )  # leaves it nothing to resize
    pixels = processor.preprocess(images=resized, return_tensors="pt")["pixel_values"]
    output = image_encoder(pixels.to(image_encoder.device, image_encoder.dtype))
    states: torch.Tensor = output.last_hidden_state
    return states.cpu()
