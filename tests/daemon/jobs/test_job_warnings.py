"""What should be known of a job that is done all the same."""

from framepack_core.request import Cut
from framepackd.jobs import job_warnings

SETTINGS = {
    "prompt": "pan left",
    "negative_prompt": "blur",
    "prompts": [{"from": 0, "to": 1, "text": "the cat sits"}, {"from": 1, "to": 2, "text": "the cat runs"}],
}


def cut(text: str) -> Cut:
    return Cut(text, "llama", 300, 256, "at last")


def test_each_prompt_is_named_by_its_key_in_the_settings() -> None:
    texts = ("pan left", "blur", "the cat runs")
    entries = job_warnings.recorded(SETTINGS, map(cut, texts))
    assert [entry["key"] for entry in entries] == ["prompt", "negative_prompt", "prompts.1"]
    assert job_warnings.of_cuts(entries)[2] == (
        "prompts.1 is cut: the text encoder takes 256 of its 300 tokens, and what begins with 'at last' has "
        "no effect: shorten it"
    )


def test_of_a_text_in_two_places_the_first_is_named() -> None:
    (entry,) = job_warnings.recorded(SETTINGS | {"negative_prompt": "pan left"}, [cut("pan left")])
    assert entry["key"] == "prompt"
    (entry,) = job_warnings.recorded({"prompt": "pan left"}, [cut("pan left")])  # of an older job
    assert entry["key"] == "prompt"


def test_what_is_dropped_does_not_speak_to_the_terminal() -> None:
    (entry,) = job_warnings.recorded(SETTINGS, [Cut("pan left", "llama", 300, 256, "a\x1b[2J\nb")])
    assert job_warnings.of_cuts([entry])[0].isprintable()


def test_unmatched_keys_of_a_lora_are_a_warning_but_not_those_of_text_encoders() -> None:
    whole = {"file": "a.safetensors", "matched": 64, "unmatched": 0, "keys": 70}
    part = {"file": "b.safetensors", "matched": 64, "unmatched": 6, "keys": 70}
    unread = {"file": "c.safetensors"}  # the model was not here
    assert job_warnings.of_loras({"loras": [whole, part, unread]}) == [
        "LoRA b.safetensors: 6 of its keys belong nowhere and have no effect"
    ]
    assert job_warnings.of_loras({}) == []
