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
from framepack_core.request import Cut

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
MAX_POOLED_TOKENS = 77  # with the begin and end tokens
PADDED_PROMPT_TOKENS = 512  # length FramePack was trained with; rows past the prompt are masked
LONGEST_WORD = 40  # characters: where a text has no space for longer, it is quoted from where the cut is
MAX_DROPPED_WORDS, MAX_DROPPED = 8, 80  # words and characters that a warning quotes
TEXT_LAYER = -3  # index in hidden_states: the output of the last layer but two, before the final norm


@dataclass(frozen=True)
class TextConditioning:
    """An encoded prompt."""

    prompt_embeds: torch.Tensor  # (1, 512, C)
    prompt_embeds_mask: torch.Tensor  # (1, 512), bool, false for padding
    pooled_prompt_embeds: torch.Tensor  # (1, P)
    cuts: tuple[Cut, ...] = ()  # one for each encoder that the prompt is too long for

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextConditioning":
        """Move all tensors to a device; all but the mask change their dtype."""
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
    """Encode a prompt, unchanged, with Llama (tokens) and CLIP (pooled); their dtype, on the CPU.

    ``device`` is where the encoders compute.
    """
    ids, mask = tokenize_llama(prompt, tokenizer)
    valid = int(mask.sum())
    output = text_encoder(
        input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
    )
    embeds = output.hidden_states[TEXT_LAYER][:, TEMPLATE_TOKENS:valid]
    pooled = text_encoder_2(tokenize_clip(prompt, tokenizer_2).to(device)).pooler_output
    cuts = (cut_llama(prompt, tokenizer), cut_clip(prompt, tokenizer_2))
    return replace(pad_prompt_embeds(embeds.cpu(), pooled.cpu()), cuts=tuple(filter(None, cuts)))


def pad_prompt_embeds(
    embeds: torch.Tensor, pooled: torch.Tensor, length: int = PADDED_PROMPT_TOKENS
) -> TextConditioning:
    """Pad or cut prompt embeds (1, N, C) to ``length`` rows; the mask is true for the prompt's rows."""
    rows = min(embeds.shape[1], length)
    padded = embeds.new_zeros(embeds.shape[0], length, embeds.shape[2])
    padded[:, :rows] = embeds[:, :rows]
    mask = torch.zeros(embeds.shape[0], length, dtype=torch.bool, device=embeds.device)
    mask[:, :rows] = True
    return TextConditioning(padded, mask, pooled)


def tokenize_llama(prompt: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[torch.Tensor, torch.Tensor]:
    """Give token ids and attention mask, each (1, 351), of the prompt in the template."""
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
    """Describe what ``tokenize_llama`` cuts off a prompt; None if it cuts off no words."""
    tokens = tokenizer(TEMPLATE.format(prompt), return_offsets_mapping=True, verbose=False)
    begin, end = len(TEMPLATE_PREFIX), len(TEMPLATE_PREFIX) + len(prompt)
    offsets = tokens["offset_mapping"][TEMPLATE_TOKENS:]
    starts = [start - begin for start, _ in offsets if begin <= start < end]
    return _cut(prompt, "llama", starts, MAX_PROMPT_TOKENS)


def tokenize_clip(prompt: str, tokenizer: "CLIPTokenizer") -> torch.Tensor:
    """Give token ids (1, 77)."""
    tokens = tokenizer(
        clean_for_clip(prompt),
        padding="max_length",
        max_length=MAX_POOLED_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = tokens["input_ids"]
    return ids


def cut_clip(prompt: str, tokenizer: "CLIPTokenizer") -> Cut | None:
    """Describe what ``tokenize_clip`` cuts off a prompt; None if it cuts off no words."""
    cleaned = clean_for_clip(prompt)
    tokens = tokenizer(cleaned, return_offsets_mapping=True, verbose=False)
    # Cleaning only adds spaces and removes characters: count the others to find a token in the prompt.
    places = [place for place, c in enumerate(prompt) if _kept_for_clip(c) and not c.isspace()]
    passed = list(accumulate((not c.isspace() for c in cleaned), initial=0))
    starts = [places[passed[start]] for start, _ in tokens["offset_mapping"][1:-1]]
    return _cut(prompt, "clip", starts, MAX_POOLED_TOKENS - 2)


def _cut(prompt: str, encoder: Literal["llama", "clip"], starts: list[int], most: int) -> Cut | None:
    """Describe the cut of a prompt whose tokens begin at ``starts`` and of which ``most`` are read."""
    dropped = first_words(prompt, starts[most]) if len(starts) > most else ""
    return Cut(prompt, encoder, len(starts), most, dropped) if dropped else None


def first_words(text: str, start: int) -> str:
    """Give the first words that are cut off at ``start``, beginning with the word that ``start`` is in.

    >>> first_words("pan left, then zoom in", 12)
    'then zoom in'
    """
    start = len(text) - len(text[start:].lstrip())  # tokens begin with the space in front of their word
    begun = re.search(rf"(?<!\S)\S{{1,{LONGEST_WORD}}}\Z", text[:start])
    words = text[begun.start() if begun and text[start:] else start :].split()
    quoted = " ".join(words[:MAX_DROPPED_WORDS])
    whole = len(words) <= MAX_DROPPED_WORDS and len(quoted) <= MAX_DROPPED
    return quoted if whole else quoted[:MAX_DROPPED] + "…"


# Unicode blocks of which the tokenizer of transformers 4 treated each character as a word.
_IDEOGRAPHS = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


def clean_for_clip(prompt: str) -> str:
    """Prepare a prompt as the slow CLIP tokenizer of transformers 4 did.

    FramePack was published with it, and transformers 5 has only the fast one. Without this, Japanese and
    Chinese prompts, and those with zero-width characters, get other token ids.
    """
    return _IDEOGRAPHS.sub(r" \1 ", "".join(filter(_kept_for_clip, prompt)))


def _kept_for_clip(character: str) -> bool:
    return character in "\t\n\r" or unicodedata.category(character) not in ("Cc", "Cf")


def verify_prompt_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Check that the template's prefix has the 95 tokens that are cut off after encoding.

    A tokenizer class that does not fit its files drops the spaces of every prompt without an error.

    Raises:
        ModelError: it has another number of tokens.
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
    # Here, not by the processor: resize gives the same bits with every Pillow.
    resized = resize(picture, (size["height"], size["width"]), resample=resample)
    pixels = processor.preprocess(images=resized, return_tensors="pt")["pixel_values"]
    output = image_encoder(pixels.to(image_encoder.device, image_encoder.dtype))
    states: torch.Tensor = output.last_hidden_state
    return states.cpu()
