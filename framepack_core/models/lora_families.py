"""Tells for which family of models a LoRA was trained, by what its trainer wrote into the file.

Several families share names and even shapes of layers with HunyuanVideo: FLUX.1 has double_blocks and
single_blocks too. What fits by its shapes alone may so belong to another model. No torch here.
"""

import re
from collections.abc import Mapping

# ModelSpec's key, which many programs write, and two of kohya's.
_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_network_module")
_OURS = re.compile(r"\bframe-?pack|\b(hunyuan|hy)-?video(?!-?v?1-?5)")
# Found in values whose separators are all "-"; the first that is found counts.
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
    """Name the family that a LoRA was trained for, and the entry that says so.

    None where that is HunyuanVideo or FramePack, where nothing is said, and where what is said is not known:
    kohya's programs write "networks.lora" for several families.
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
