"""Memory plans for the cards and hosts that people have."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import full_shape
from framepack_core.memory import footprint
from framepack_core.memory.footprint import (
    GIB,
    PUBLISHED,
    ItemBytes,
    MemoryLevel,
    Video,
    memory_levels,
    peak_vram,
    weights,
)
from framepack_core.memory.planning import Card, Host, host_memory, make_plan
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from tests.conftest import tiny_spec
from tests.golden import TINY_MODELS

VIDEO = Video(640, 608)


@pytest.mark.parametrize(
    ("card", "level", "most"),
    [
        (80, MemoryLevel(None, "all"), 60),
        (48, MemoryLevel(256, "all"), 45),
        (24, MemoryLevel(256, "core"), 22),
        (16, MemoryLevel(256, "partly"), 15.2),
        (12, MemoryLevel(256, "partly"), 11.4),
        (8, MemoryLevel(256, "partly"), 7.6),
        (6, MemoryLevel(256, "partly"), 5.7),
    ],
)
@pytest.mark.parametrize("host", [128, 64, 32, 16, 8])
def test_each_card_gets_the_first_level_that_fits_whatever_the_host(
    card: int, level: MemoryLevel, most: float, host: int
) -> None:
    plan = make_plan(PUBLISHED, Card.assumed(card), Host.assumed(host), VIDEO)
    assert plan.levels[plan.level] == level
    assert plan.shortage is None
    assert plan.vram <= most * GIB


@pytest.mark.parametrize(
    ("host", "pinned", "most_gb", "speed"),
    [
        (128, True, 22.3, "full where a step takes over {:.1f} s"),
        (64, True, 22.3, "full where a step takes over {:.1f} s"),
        (32, True, 22.3, "full where a step takes over {:.1f} s"),
        (24, False, 4.1, "slower where a step takes less than"),
        (16, False, 4.1, "slow"),
        (8, False, 4.1, "slow: every step reads"),
    ],
)
@pytest.mark.parametrize(("card", "left_gb"), [(16, 11.6), (12, 7.7), (8, 3.8), (6, 1.8)])
def test_streaming_takes_page_locked_memory_only_where_the_host_has_it(
    card: int, left_gb: float, host: int, pinned: bool, most_gb: float, speed: str
) -> None:
    plan = make_plan(PUBLISHED, Card.assumed(card), Host.assumed(host), VIDEO)
    assert plan.shortage is None
    assert plan.room == pytest.approx(left_gb * 1e9, abs=1e8)
    speed = speed.format((18.15 - left_gb) / 20)
    assert plan.pinned is pinned
    assert plan.ram <= most_gb * 1e9
    assert plan.ram <= host * GIB * 0.875
    assert plan.speed.startswith(speed)


def test_too_small_a_card_is_refused_with_what_is_short_and_what_would_do() -> None:
    plan = make_plan(PUBLISHED, Card.assumed(4), Host.assumed(32), VIDEO)
    assert plan.hopeless
    assert plan.shortage == (
        "a video of 608x640 needs 3.9 GiB of VRAM, and 3.8 are free, 0.1 too few: "
        "set resolution = 608, or use a card with 5 GiB or more"
    )
    smaller = Video(512, 512)
    assert make_plan(PUBLISHED, Card.assumed(4), Host.assumed(32), smaller).shortage is None


def test_four_bit_weights_stay_on_the_card_or_are_refused() -> None:
    small, host = ItemBytes.of(2, 2, "nf4"), Host.assumed(32)
    plan = make_plan(PUBLISHED, Card.assumed(10), host, VIDEO, item_bytes=small)
    assert plan.shortage is None
    assert plan.levels[plan.level].placement == "core"
    assert all(level.placement != "streamed" for level in plan.levels)
    plan = make_plan(PUBLISHED, Card.assumed(6), host, VIDEO, item_bytes=small)
    assert plan.shortage is not None
    assert 'set precision = "exact" or "fp8"' in plan.shortage


def test_memory_of_other_programs_on_the_card_is_not_hopeless() -> None:
    card = replace(Card.assumed(24), free=3 * GIB)
    plan = make_plan(PUBLISHED, card, Host.assumed(32), VIDEO)
    assert plan.shortage is not None
    assert "end what else uses the card" in plan.shortage
    assert not plan.hopeless


def test_too_small_a_host_is_refused() -> None:
    plan = make_plan(PUBLISHED, Card.assumed(24), Host.assumed(2), VIDEO)
    assert plan.hopeless
    assert plan.shortage is not None
    assert "GiB of RAM are needed and 1.8 are available" in plan.shortage
    occupied = replace(Host.assumed(32), available=2 * GIB)
    assert not make_plan(PUBLISHED, Card.assumed(24), occupied, VIDEO).hopeless


def test_memory_to_keep_free_is_not_planned() -> None:
    card, host = Card.assumed(24), Host.assumed(32)
    plan = make_plan(PUBLISHED, card, host, VIDEO, keep_free=6 * GIB)
    assert plan.levels[plan.level].placement == "partly"
    assert plan.vram <= card.free - 6 * GIB
    plan = make_plan(PUBLISHED, card, host, VIDEO, keep_free=20 * GIB)
    assert plan.shortage is not None
    assert "lower gpu_memory_preservation, which keeps 20.0 GiB" in plan.shortage


def test_tiles_are_as_the_reference_has_them_unless_set() -> None:
    def tile(gib: float, **arguments: bool) -> int | None:
        plan = make_plan(PUBLISHED, Card.assumed(gib), Host.assumed(64), VIDEO, **arguments)  # type: ignore[arg-type] # tiling
        assert plan.shortage is None
        return plan.levels[plan.level].tile

    assert tile(63) == 256, "below 60 GiB free"
    assert tile(64) is None
    assert tile(80, tiling=True) == 256
    assert tile(24, tiling=False) is None
    refused = make_plan(PUBLISHED, Card.assumed(12), Host.assumed(64), VIDEO, tiling=False)
    assert refused.shortage is not None
    assert 'set vae_tiling = "auto"' in refused.shortage


def test_every_level_takes_less_memory_than_the_one_before() -> None:
    for tiling in ("auto", True, False):
        peaks = [peak_vram(PUBLISHED, level, Video(640, 640)) for level in memory_levels(tiling, VIDEO)]
        assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("video", "gib"),
    [(Video(640, 608), 1.93), (Video(320, 320), 0.54)],
)
def test_activations_are_as_they_were_measured(video: Video, gib: float) -> None:
    """Compared with the live tensors at the transformer's peak, at full shape, with a prompt of 96 tokens."""
    without = replace(PUBLISHED, core=replace(PUBLISHED.core, parameters=0, largest=0))
    streamed = MemoryLevel(128, "streamed")
    longest_text = (256 - 96) * 113_200
    sampling = (video.tokens * 113_200 - longest_text) / GIB
    assert sampling == pytest.approx(gib, rel=0.1)
    assert peak_vram(without, streamed, video) / GIB >= gib


@pytest.mark.parametrize(
    ("size", "window", "tokens"),
    [((640, 608), 9, 18325), ((832, 480), 9, 18791), ((320, 320), 9, 5425), ((320, 576), 9, 9105)],
)
def test_tokens_are_those_of_the_transformer(size: tuple[int, int], window: int, tokens: int) -> None:
    assert Video(*size, window=window).tokens == tokens - 96 + 256


@pytest.mark.parametrize(
    ("bigger", "much"),
    [(Video(960, 960), 1.2), (Video(640, 608, window=33), 1.9), (Video(640, 608, cached=True), 1.05)],
)
def test_larger_videos_take_more(bigger: Video, much: float) -> None:
    streamed = MemoryLevel(128, "streamed")
    assert peak_vram(PUBLISHED, streamed, bigger) > peak_vram(PUBLISHED, streamed, VIDEO) * much


def test_sizes_are_read_from_the_files_of_the_model() -> None:
    found = weights(tiny_spec())
    loaded = sum(
        torch.tensor(told["shape"]).prod()
        for file in TINY_MODELS.joinpath("framepack-i2v").glob("*.safetensors")
        for name, told in header(file).items()
        if name != "__metadata__"
    )
    assert found.on_disk
    assert found.core.parameters + found.embedders.parameters == loaded
    assert 0 < found.core.largest < found.core.parameters
    assert found.vae.stored_bytes == found.vae.parameters * found.vae.item_bytes


def test_files_of_the_published_shape_give_the_published_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modulations move one by one: counted as one component they were 2.3 of 3.8 billion parameters."""
    found = {
        part: SimpleNamespace(
            tensors={
                name: SimpleNamespace(parameters=math.prod(shape), nbytes=math.prod(shape) * dtype.itemsize)
                for name, shape in full_shape.layout(part).items()
            }
        )
        for part, dtype in full_shape.STORED.items()
    }
    monkeypatch.setattr(footprint, "look", lambda spec: found)
    told = weights(tiny_spec())
    for part in ("core", "embedders", "text_encoder"):
        ours, published = getattr(told, part), getattr(PUBLISHED, part)
        assert ours.parameters == pytest.approx(published.parameters, rel=0.01), part
        assert ours.largest == pytest.approx(published.largest, rel=0.01), part


def header(file: Path) -> dict[str, dict[str, list[int]]]:
    content = file.read_bytes()
    header: dict[str, dict[str, list[int]]] = json.loads(
        content[8 : 8 + int.from_bytes(content[:8], "little")]
    )
    return header


def test_the_published_sizes_stand_in_for_a_model_that_is_not_here(tmp_path: Path) -> None:
    nowhere = Source(str(tmp_path / "none"))
    spec = ModelSpec("mine", "framepack", nowhere, nowhere, nowhere)
    assert weights(spec) == PUBLISHED
    assert PUBLISHED.core.parameters * 2 == pytest.approx(18.15e9, rel=1e-3)
    assert (PUBLISHED.core.parameters + PUBLISHED.embedders.parameters) * 2 == pytest.approx(
        25.75e9, rel=1e-3
    )


def test_converted_weights_count_as_ram_and_others_as_mapped() -> None:
    card, host = Card.assumed(80), Host.assumed(128)
    as_stored = make_plan(PUBLISHED, card, host, VIDEO)
    in_float32 = make_plan(PUBLISHED, card, host, VIDEO, item_bytes=ItemBytes(4, 4, 4))
    assert as_stored.ram < 3.5 * GIB
    assert in_float32.ram > PUBLISHED.core.parameters * 4
    assert in_float32.mapped == as_stored.mapped


def test_on_the_cpu_the_model_is_in_ram() -> None:
    plan = make_plan(weights(BUILT_IN["demo"]), None, Host.assumed(4), VIDEO, item_bytes=ItemBytes(4, 4, 4))
    assert plan.shortage is None
    assert {where for _, where in plan.places.values()} == {"in RAM"}
    assert make_plan(PUBLISHED, None, Host.assumed(32), VIDEO, item_bytes=ItemBytes(4, 4, 4)).hopeless


def test_the_control_group_and_those_above_it_limit_the_host(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   25165824 kB\n")
    cgroup.write_text("1:cpu:/elsewhere\n0::/system.slice/framepackd.service\n")
    root = tmp_path / "cgroups"
    assert host_memory(meminfo, cgroup, root) == Host(32 * GIB, 24 * GIB)

    def limited(folder: Path, most: str, used: int, files: int) -> None:
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\nactive_file 0\n")

    limited(root / "system.slice/framepackd.service", "max", 0, 0)
    assert host_memory(meminfo, cgroup, root) == Host(32 * GIB, 24 * GIB)
    (root / "system.slice/memory.max").write_text(f"{16 * GIB}\n")
    (root / "system.slice/memory.current").write_text(f"{10 * GIB}\n")
    (root / "system.slice/memory.stat").write_text(f"anon 1\ninactive_file {4 * GIB}\nactive_file {GIB}\n")
    assert host_memory(meminfo, cgroup, root) == Host(16 * GIB, 11 * GIB)


def test_fewer_bits_keep_the_sampling_loop_on_a_smaller_card() -> None:
    plan = make_plan(
        PUBLISHED, Card.assumed(16), Host.assumed(32), VIDEO, item_bytes=ItemBytes.of(2, 2, "fp8")
    )
    assert plan.levels[plan.level].placement == "core"
    assert plan.vram < 14 * GIB
    assert plan.ram > 9e9, "it is converted"


def test_frames_too_large_for_the_kernels_are_decoded_in_tiles_whatever_the_card() -> None:
    """The decoder's largest tensor must hold less than 2^31 numbers: 704x640 is the first size with more."""
    card, host = Card.assumed(140), Host.assumed(128)
    assert make_plan(PUBLISHED, card, host, Video(656, 656)).levels[0].tile is None
    large = make_plan(PUBLISHED, card, host, Video(704, 640))
    assert all(level.tile is not None for level in large.levels)
    refused = make_plan(PUBLISHED, card, host, Video(704, 640), tiling=False)
    assert refused.hopeless
    assert refused.shortage == (
        "frames of 640x704 are too large to be decoded whole, whatever the card: "
        'set vae_tiling = "auto", or a smaller resolution'
    )


def test_after_a_wrong_prediction_half_of_the_blocks_stay() -> None:
    """A card on which "core" was to fit, and did not: with the same prediction all blocks would stay."""
    plan = make_plan(PUBLISHED, Card.assumed(24), Host.assumed(64), VIDEO)
    assert plan.levels[plan.level].placement == "core"
    assert plan.room == PUBLISHED.core.parameters
