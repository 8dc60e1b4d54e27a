"""Recognizes from a LoRA's metadata which family of models it was trained for.

Several families share the names and even the shapes of layers with HunyuanVideo; FLUX.1 has double_blocks and
single_blocks too. So a LoRA can fit by its shapes and still be for another model. No torch here.
"""

import re
from collections.abc import Mapping

# The key of the ModelSpec standard, which many programs write, and two of kohya's.
_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_network_module")
_OURS = re.compile(r"\bframe-?pack|\b(hunyuan|hy)-?video(?!-?v?1-?5)")
# Matched against values in which every separator is "-"; the first match counts.
_OTHERS = {
    "HunyuanVideo 1.5": r"hunyuan-?video|hv-?1-?5",
    "HunyuanImage": r"hunyuan-?image",
    "HunyuanDiT": r"(hunyuan|hy)-?dit",
    "FLUX.2": r"flux-?v?2(?!\d)",
    "Chroma": r"chroma",
    "FLUX.1": r"flux",
    "SDXL": r"sd-?xl|stable-?diffusion-?xl|pony|illustrious|noob-?ai",
    "Stable Diffusion 3": r"(sd|stable-?diffusion)-?v?3",
    "Stable Diffusion 2": r"(sd|stable-?diffusion)-?v?2",
    "Stable Diffusion 1.5": r"(sd|stable-?diffusion)-?v?1",
    "Stable Video Diffusion": r"stable-?video|svd\b",
    "Stable Cascade": r"stable-?cascade",
    "Wan": r"wan(\b|-?v?\d|video|vace)",
    "LTX-Video": r"ltx",
    "CogVideoX": r"cog-?video",
    "Mochi": r"mochi",
    "Qwen-Image": r"qwen",
    "HiDream": r"hi-?dream",
    "Lumina": r"lumina",
    "Z-Image": r"z-?image",
    "Kandinsky": r"kandinsky",
    "Cosmos": r"cosmos",
    "PixArt": r"pix-?art",
    "Sana": r"sana\b",
    "AuraFlow": r"aura-?flow",
    "OmniGen": r"omni-?gen",
    "Kolors": r"kolors",
    "Krea": r"krea",
    "Anima": r"anima\b",
}


def other_family(metadata: Mapping[str, object]) -> tuple[str, str] | None:
    """Name the other family that a LoRA was trained for, and the metadata entry that says so.

    None for HunyuanVideo and FramePack, and if the metadata names no known family: kohya's programs write
    "networks.lora" for several families.
    """
    said = {key: value for key in _KEYS if isinstance(value := metadata.get(key), str)}
    plain = {key: re.sub(r"[^a-z0-9]+", "-", value.lower()) for key, value in said.items()}
    if any(_OURS.search(value) for value in plain.values()):
        return None
    for key, value in plain.items():
        for family, pattern in _OTHERS.items():
            if re.search(rf"\b({pattern})", value):
                return family, f"{key} = {said[key][:100]!r}"
    return None
