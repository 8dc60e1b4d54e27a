"""The text and image encoders: small, random and never trained, with tokenizers of the grammar's words.

    python -m training.text FOLDER

A token's embedding is random, but the same for words that begin alike ("pan", "Pans", " panning"): so
nothing has to be learnt twice. CLIP's code of a whole sentence would be another one for every sentence, to
be learnt by heart; its last normalization is zero, and with it the code. The tokenizer has as many merges
as make the prompt template the 95 tokens that it has to be.

A word that is not in the grammar becomes "cat", which says nothing of a motion. Cut into pieces it could:
"knight" ends in "night".
"""

import hashlib
import json
import random
import re
from pathlib import Path

import click
import torch
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

from framepack_core.networks.encoders import TEMPLATE_PREFIX, TEMPLATE_TOKENS
from training.prompts import FILLERS, FRAMES, LINKS, OTHERS, PHRASES, STAND_IN, SUBJECTS, draw

BOS, HEADER, HEADER_END, EOT, PAD = SPECIAL = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
]
LLAMA_WORDS = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
CLIP_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
ENDINGS = "ing|wards|ward|ies|es|s|ed|y"
ENDING = re.compile(rf"({ENDINGS})\Z")
TEXT_DIM, POOLED_DIM, IMAGE_DIM = 64, 32, 32


def sentences() -> list[str]:
    """Draw what the tokenizers are made for."""
    by = random.Random(0)
    drawn = [draw(motion, by) for motion in (*PHRASES, None) for _ in range(400)]
    words = sorted({word for sentence in (*drawn, *OTHERS) for word in re.findall(r"\w+", sentence)})
    # Each word in the forms in which people write it.
    return drawn + [form for word in words for form in (f"{word} {word}", word.capitalize(), f". {word}")]


def known_words() -> set[str]:
    """Give the words of the grammar and of the prompt template, in lower case."""
    named = [*FILLERS.values(), *PHRASES.values(), OTHERS, SUBJECTS, FRAMES, LINKS, (TEMPLATE_PREFIX,)]
    texts = (re.sub(r"\{.*?\}", " ", text) for group in named for text in group)
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def stand_in_for_unknown_words() -> normalizers.Normalizer:
    """Give what puts ``STAND_IN`` in the place of each word that is unknown in every form."""
    words = known_words()
    stems = {stem_of(word) for word in words}
    forms = f"{'|'.join(sorted(words))}|(?=\\p{{L}}{{5}})(?:{'|'.join(sorted(stems))})(?:{ENDINGS})?"
    letter = r"[\p{L}\p{M}]"
    unknown = rf"(?<![\p{{L}}\p{{M}}'’])(?!(?i:{forms})(?!{letter})){letter}+"
    return normalizers.Replace(Regex(unknown), STAND_IN)


def llama_tokenizer(vocabulary: int, texts: list[str]) -> Tokenizer:
    """Train a byte-level tokenizer like Llama's."""
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
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def fitting_tokenizer() -> Tokenizer:
    """Train one that turns the template into as many tokens as it must be: with merges that cut it up less.

    Raises:
        click.ClickException: none does.
    """
    words = sentences()
    for weight in range(1, 60):
        # The more often the tokenizer sees the template, the fewer tokens that becomes.
        tokenizer = llama_tokenizer(1600, [*words, *[TEMPLATE_PREFIX] * weight])
        count = len(tokenizer.encode(TEMPLATE_PREFIX).ids)
        if count <= TEMPLATE_TOKENS:
            break
    for vocabulary in range(1600, 600, -1):
        tokenizer = llama_tokenizer(vocabulary, [*words, *[TEMPLATE_PREFIX] * weight])
        if len(tokenizer.encode(TEMPLATE_PREFIX).ids) == TEMPLATE_TOKENS:
            return tokenizer
    raise click.ClickException("no vocabulary makes the template 95 tokens")


def embedding_of(token: str) -> torch.Tensor:
    """Give a token's embedding (64,): that of its word without its ending, and a little of its own."""
    word = token.replace("Ġ", "").lower()

    def drawn(what: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:6], "big")
        return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))

    return 0.95 * drawn(stem_of(word)) + 0.3 * drawn(word)


def stem_of(word: str) -> str:
    """Give a word without its ending, if it is long enough to have one."""
    return ENDING.sub("", word) if len(word) > 4 else word


def build_llama(folder: Path) -> None:
    """Write tokenizer and text encoder."""
    fitting = fitting_tokenizer()
    fitting.normalizer = stand_in_for_unknown_words()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fitting,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        padding_side="right",
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
    model = LlamaModel(config)
    with torch.no_grad():
        for token, number in tokenizer.get_vocab().items():
            model.embed_tokens.weight[number] = embedding_of(token)
    model.half().save_pretrained(folder / "text_encoder")


def build_clip(folder: Path) -> None:
    """Write the second tokenizer and text encoder, whose code is zero."""
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
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    words = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    words += [letter + "</w>" for letter in alphabet if letter + "</w>" not in trained["vocab"]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    files = folder / "tokenizer_2"
    files.mkdir(parents=True)
    numbered = {word: number for number, word in enumerate(words)}
    (files / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False))
    merges = "\n".join(" ".join(pair) for pair in trained["merges"])
    (files / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (files / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=POOLED_DIM,
        intermediate_size=64,
        projection_dim=POOLED_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
        norm.weight.zero_()
        norm.bias.zero_()
    model.half().save_pretrained(folder / "text_encoder_2")


def build_image_encoder(folder: Path) -> None:
    """Write the image encoder and its processor."""
    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
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


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write all of them below FOLDER, as a model's folder has them."""
    torch.manual_seed(0)
    build_llama(folder / "base")
    build_clip(folder / "base")
    build_image_encoder(folder / "image_encoder")


if __name__ == "__main__":
    main()
