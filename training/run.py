"""A training run: its optimizer, its averaged weights, its curve, and checkpoints that it goes on from."""

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import distributed, nn

SAVE_EVERY = 100  # iterations


class Run:
    """Goes on from its last checkpoint in ``folder``; with the CPU seconds of all so far."""

    def __init__(self, folder: Path, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Take up what is there."""
        self.folder, self._model, self._optimizers = folder, model, optimizers
        self.iteration, self._seconds, self._loss = 0, 0.0, float("nan")
        self._average = {name: value.clone() for name, value in model.state_dict().items()}
        self._file, self._curve = folder / "checkpoint.pt", folder / "curve.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            found = torch.load(self._file, weights_only=False)  # our own
            self.iteration, self._seconds = found["iteration"], found["seconds"]
            self._average = found["average"]
            model.load_state_dict(found["model"])
            for optimizer, state in zip(optimizers, found["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            random.setstate(found["random"])
            torch.set_rng_state(found["generator"])
        self._begun = time.process_time() - self._seconds

    def to(self, iterations: int, *, rate: float, warm_up: int, decay: float = 1.0) -> Iterator[int]:
        """Count the iterations, from 1; the rate falls as a cosine over the last ``decay`` of them."""
        while self.iteration < iterations:
            done = max((self.iteration / iterations - 1 + decay) / decay, 0.0)
            factor = min(1.0, (self.iteration + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * done))
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("scale", 1.0) * factor
            self.iteration += 1
            yield self.iteration
            if self.iteration % SAVE_EVERY == 0:
                self.save()
        self.save()

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient, if it is one; of several processes that train together, their mean."""
        loss.backward()
        if distributed.is_initialized():
            gradients = [weight.grad for weight in self._model.parameters() if weight.grad is not None]
            flat = torch._utils._flatten_dense_tensors(gradients)
            distributed.all_reduce(flat)
            flat /= distributed.get_world_size()
            parts = torch._utils._unflatten_dense_tensors(flat, gradients)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part)
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer in self._optimizers:
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self._loss = value if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * value
        kept = min(0.998, (1 + self.iteration) / (10 + self.iteration)) ** 4
        if self.iteration % 4 == 0:
            with torch.no_grad():
                for name, now in self._model.state_dict().items():
                    self._average[name].lerp_(now, 1 - kept)

    def note(self, **figures: Any) -> None:
        """Add to the curve."""
        if not self.first:
            return
        seconds = round(time.process_time() - self._begun)
        entry = {"iteration": self.iteration, "cpu_seconds": seconds, "loss": round(self._loss, 5)} | {
            name: round(figure, 4) if isinstance(figure, float) else figure
            for name, figure in figures.items()
        }
        with self._curve.open("a") as curve:
            curve.write(json.dumps(entry) + "\n")
        click.echo(json.dumps(entry))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the model be the average of its last states."""
        now = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(self._average)
        yield
        self._model.load_state_dict(now)

    @property
    def first(self) -> bool:
        """Whether this is the only process that trains, or the one that writes."""
        return not distributed.is_initialized() or distributed.get_rank() == 0

    def save(self) -> None:
        """Keep all that going on takes."""
        if not self.first:
            return
        state = {
            "iteration": self.iteration,
            "seconds": time.process_time() - self._begun,
            "average": self._average,
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "random": random.getstate(),
            "generator": torch.get_rng_state(),
        }
        part = self._file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._file)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Give the peak signal to noise ratio of values in [-1, 1], in dB."""
    error = (one.clamp(-1, 1) - other).pow(2).mean().item()
    return 10 * math.log10(4 / max(error, 1e-10))
