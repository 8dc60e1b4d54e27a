"""Reading of the recorded cases."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TINY_MODELS = HERE / "tiny-models"
_INDEX = json.loads((HERE / "index.json").read_text())


@dataclass(frozen=True)
class Case:
    """One recorded run of the reference."""

    id: str
    params: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(HERE / "cases" / f"{self.id}.safetensors")


CASES = {entry["id"]: Case(entry["id"], entry["params"]) for entry in _INDEX["cases"]}


def group(letter: str) -> list[Case]:
    return [case for case in CASES.values() if case.id.startswith(letter)]


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Give the largest absolute difference; a difference in shape is a failure of its own."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()
