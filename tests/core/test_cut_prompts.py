"""A prompt that is too long for a text encoder: which words are cut off."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from framepack_core.conditioning import Encoders
from framepack_core.engine import Engine
from framepack_core.models.registry import BUILT_IN, find
from framepack_core.networks import encoders as conditioning
from framepack_core.networks.encoders import (
    MAX_POOLED_TOKENS,
    MAX_PROMPT_TOKENS,
    cut_clip,
    cut_llama,
    first_words,
)
from tests.conftest import tiny_spec
from tests.core.requests import request_for

BASES = {"tiny": find(tiny_spec()).base, "demo": find(BUILT_IN["demo"]).base}


@cache
def llama(base: str) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(BASES[base] / "tokenizer")
    return tokenizer


@cache
def clip(base: str) -> CLIPTokenizer:
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(BASES[base] / "tokenizer_2")
    return tokenizer


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        ("pan left, then zoom in", 9, "then zoom in"),  # at a space
        ("pan left, then zoom in", 10, "then zoom in"),
        ("pan left, then zoom in", 12, "then zoom in"),  # in a word
        ("pan left", 8, ""),
        ("pan left \n ", 8, ""),
        ("a b c d e f g h i j", 2, "b c d e f g h i…"),
        ("x" * 200, 150, "x" * 50),  # no word goes back so far
        ("x" * 200, 30, "x" * 80 + "…"),
        ("", 0, ""),
    ],
)
def test_the_first_words_that_are_dropped_are_whole_and_few(text: str, start: int, words: str) -> None:
    assert first_words(text, start) == words


SENTENCES = (
    "the camera pans left over a quiet lake, then the light changes and a boat drifts by",
    "Ein Boot treibt über den See; 夕陽の下で café-Gäste warten",
    "quetzalcoatl \u200bxylophone\n\n  zoom-in! <|eot_id|> ripples",
)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("base", BASES)
def test_llama_reads_256_tokens_and_the_words_after_them_are_reported(base: str, sentence: str) -> None:
    """The expectation is counted the slow way: word by word, with the end of the template."""
    tokenizer = llama(base)

    def tokens(text: str) -> int:
        ids: list[int] = tokenizer(conditioning.TEMPLATE.format(text), verbose=False)["input_ids"]
        return len(ids) - conditioning.TEMPLATE_TOKENS - 1

    words = [word for _ in range(60) for word in sentence.split()]
    fitting = next(n for n in range(len(words)) if tokens(" ".join(words[: n + 1])) > MAX_PROMPT_TOKENS)
    assert cut_llama(" ".join(words[:fitting]), tokenizer) is None
    cut = cut_llama(" ".join(words), tokenizer)
    assert cut is not None
    assert cut.dropped.split()[:3] == words[fitting : fitting + 3]
    assert (cut.taken, cut.tokens) == (256, tokens(" ".join(words)))


@pytest.mark.parametrize("sentence", SENTENCES[:2])
@pytest.mark.parametrize("base", BASES)
def test_clip_reads_75_tokens_and_the_reported_words_are_the_prompts(base: str, sentence: str) -> None:
    tokenizer = clip(base)

    def tokens(text: str) -> int:
        ids: list[int] = tokenizer(conditioning.clean_for_clip(text), verbose=False)["input_ids"]
        return len(ids) - 2

    words = [word for _ in range(30) for word in sentence.split()]
    fitting = next(n for n in range(len(words)) if tokens(" ".join(words[: n + 1])) > MAX_POOLED_TOKENS - 2)
    assert cut_clip(" ".join(words[:fitting]), tokenizer) is None
    cut = cut_clip(" ".join(words), tokenizer)
    assert cut is not None
    assert cut.dropped.split()[0] == words[fitting], "without the spaces that CLIP's cleaning puts in"
    assert (cut.taken, cut.tokens) == (75, tokens(" ".join(words)))


@given(st.text(max_size=40), st.sampled_from(sorted(BASES)))
@settings(deadline=None, max_examples=100)
def test_the_reported_words_of_any_text_are_in_it(text: str, base: str) -> None:
    prompt = text * 30
    for cut in (cut_llama(prompt, llama(base)), cut_clip(prompt, clip(base))):
        if cut is not None:
            assert cut.dropped.removesuffix("…") in " ".join(prompt.split())
            assert cut.tokens > cut.taken


def test_prompt_negative_prompt_and_timed_prompts_are_each_reported_once(tmp_path: Path) -> None:
    engine = Engine.load(tiny_spec(), device="cpu")
    long = {name: f"{name} " + "walks on " * 200 for name in ("cat", "dog", "cow")}
    timed = [{"from": 0, "to": 1, "text": long["dog"]}, {"from": 1, "to": 2, "text": "a frog"}]
    request = request_for(
        tmp_path, prompt=long["cat"], negative_prompt=long["cow"], prompts=timed, seconds=2, true_cfg_scale=2
    )
    encoders = Encoders(engine.models, engine.places)
    for _ in range(2):  # encoded, and as it was kept
        cuts = encoders.encode(request).cuts
        assert [(cut.text, cut.encoder) for cut in cuts] == [
            (long[name], encoder) for name in ("cat", "cow", "dog") for encoder in ("llama", "clip")
        ]
    unguided = request.model_copy(update={"true_cfg_scale": 1.0})
    assert long["cow"] not in [cut.text for cut in encoders.encode(unguided).cuts], "it has no effect"
