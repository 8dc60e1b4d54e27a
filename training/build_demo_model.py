"""Build the bundled demo model: the real classes and file layout, tiny, with random weights.

    python training/build_demo_model.py framepack_core/demo_model

Deterministic: the same libraries write the same files. The tokenizers are trained on the few sentences
below, with the number of merges that makes the prompt template the 95 tokens it has to be.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from framepack_core.conditioning import TEMPLATE_PREFIX, TEMPLATE_TOKENS

SENTENCES = [
    "pan left, the camera slowly pans to the left over the lake and the hills",
    "pan right, the camera slowly pans to the right along the street",
    "zoom in, the camera moves closer and closer to the house by the sea",
    "zoom out, the camera moves away from the mountain, wide shot",
    "night falls, the sky grows dark and the lights go out one by one",
    "the sun sets in warm colours, clouds drift, water ripples in the wind",
    "the girl dances gracefully, with clear movements, full of charm",
    "a character doing some simple body movements, smooth motion, cinematic",
    "snow falls, rain falls, fog rises from the valley, black and white film",
]
BOS, HEADER, HEADER_END, EOT, PAD = SPECIAL = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
]
LLAMA_WORDS = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
CLIP_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
TEXT_DIM, POOLED_DIM, IMAGE_DIM = 64, 64, 64


def llama_tokenizer(vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(LLAMA_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATE_PREFIX, *SENTENCES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def build_llama(folder: Path) -> None:
    found = (
        tokenizer
        for vocabulary in range(300, 1200)
        if len((tokenizer := llama_tokenizer(vocabulary)).encode(TEMPLATE_PREFIX).ids) == TEMPLATE_TOKENS
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=next(found), bos_token=BOS, eos_token=EOT, pad_token=PAD, padding_side="right"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,
    )
    LlamaModel(config).half().save_pretrained(folder / "text_encoder")


def build_clip(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(CLIP_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    words = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    words += [letter + "</w>" for letter in alphabet if letter + "</w>" not in trained["vocab"]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    files = folder / "tokenizer_2"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False)
    )
    merges = "\n".join(" ".join(pair) for pair in trained["merges"])
    (files / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (files / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=POOLED_DIM,
        intermediate_size=128,
        projection_dim=POOLED_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder_2")


def build_vae(folder: Path) -> None:
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.half().save_pretrained(folder / "vae")


def build_image_encoder(folder: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
    )
    SiglipVisionModel(config).half().save_pretrained(folder / "image_encoder")
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": 64, "width": 64},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(processor, indent=1))


def build_transformer(folder: Path) -> None:
    transformer = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(8, 12, 12),
        has_image_proj=True,
        image_proj_dim=IMAGE_DIM,
        has_clean_x_embedder=True,
    )
    transformer.half().save_pretrained(folder)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    build_llama(folder / "base")
    build_clip(folder / "base")
    build_vae(folder / "base")
    build_image_encoder(folder / "image_encoder")
    build_transformer(folder / "transformer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
