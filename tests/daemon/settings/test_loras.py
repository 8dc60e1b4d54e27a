"""The LoRAs of a job: named in its settings, found below lora_dir, recorded with what they hold."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from framepack_core.errors import RequestError
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from framepackd.cli.main import main
from framepackd.settings import loras
from framepackd.settings.job_settings import JobSettings, parse_settings
from tests.core.models.loras import make_lora, stored

DEMO = BUILT_IN["demo"]


@pytest.fixture
def lora_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    (folder / "styles").mkdir(parents=True)
    make_lora(folder / "styles/oil.safetensors", "kohya-hunyuan", stored(DEMO))
    (folder / "notes.txt").write_text("not one of them")
    return folder


def chosen(*loras: object) -> list[loras.LoraSetting]:
    return JobSettings.model_validate({"loras": loras}).loras


def test_a_lora_may_be_a_name_alone_and_its_weight_defaults_to_one() -> None:
    said = parse_settings({"loras": ["a.safetensors", {"file": "b/c.safetensors", "weight": -0.5}]}, "x.toml")
    assert said == {"loras": [{"file": "a.safetensors"}, {"file": "b/c.safetensors", "weight": -0.5}]}
    assert [entry.weight for entry in JobSettings(**said).loras] == [1.0, -0.5]


@pytest.mark.parametrize(
    ("said", "mistake"),
    [
        (
            [{"file": "../a.safetensors"}],
            r"loras.0.file must be the path of a .safetensors file below lora_dir",
        ),
        ([{"file": "/etc/a.safetensors"}], r"without \.\., got '/etc/a.safetensors'"),
        ([{"file": "a.ckpt"}], r"loras.0.file must be .* got 'a.ckpt'"),
        ([{"file": "a.safetensors", "weight": 5}], r"loras.0.weight must be -4 to 4, got 5"),
        ([{"file": "a.safetensors", "weight": True}], r"loras.0.weight must be -4 to 4, got True"),
        ([{"file": "a.safetensors", "allow_partial": "yes"}], r"loras.0.allow_partial .*got 'yes'"),
        ([{"file": "a.safetensors", "strength": 1}], r"unknown key 'loras.0.strength'"),
        ([{"weight": 1}], r"loras.0.file is missing"),
        (["a.safetensors", "a.safetensors"], r"a.safetensors is there twice, add the weights up"),
        ([f"{n}.safetensors" for n in range(17)], r"loras must be a list of at most 16 entries"),
        ("a.safetensors", r"loras must be a list, got 'a.safetensors'$"),
    ],
)
def test_a_mistake_is_reported_with_its_key_and_value(said: object, mistake: str) -> None:
    with pytest.raises(RequestError, match=f"x.toml: .*{mistake}"):
        parse_settings({"loras": said}, "x.toml")


def test_a_missing_file_is_reported_with_those_that_are_there(lora_dir: Path) -> None:
    (lora_dir / "styles/._oil.safetensors").write_bytes(b"left by macOS")
    with pytest.raises(RequestError, match=r"no oil.safetensors in .*\(there are styles/oil.safetensors\)"):
        loras.find("oil.safetensors", lora_dir)
    for number in range(12):
        (lora_dir / f"{number:02}.safetensors").touch()
    assert loras.listing(lora_dir).endswith("08.safetensors, 09.safetensors and 3 more")
    with pytest.raises(RequestError, match=r"\(there is no such folder\)"):
        loras.find("oil.safetensors", lora_dir / "elsewhere")
    with pytest.raises(RequestError, match=r"there is no x+"):
        loras.find("x" * 300 + ".safetensors", lora_dir)
    (lora_dir / "styles.safetensors").mkdir()
    with pytest.raises(RequestError, match=r"there is no styles.safetensors"):
        loras.find("styles.safetensors", lora_dir)


def test_a_folder_that_cannot_be_looked_into_fails_the_job_and_is_not_blamed_on_the_inbox(
    lora_dir: Path,
) -> None:
    with pytest.raises(RequestError, match="it cannot be read: File name too long"):
        loras.find("oil.safetensors", lora_dir / ("x" * 300))


def test_links_may_stay_in_the_folder_and_not_lead_out_of_it(lora_dir: Path, tmp_path: Path) -> None:
    (lora_dir / "inside.safetensors").symlink_to("styles/oil.safetensors")
    assert loras.find("inside.safetensors", lora_dir) == (lora_dir / "styles/oil.safetensors").resolve()
    (tmp_path / "secret.safetensors").touch()
    (lora_dir / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (lora_dir / "up").symlink_to(tmp_path)
    for name in ("out.safetensors", "up/secret.safetensors"):
        with pytest.raises(RequestError, match=f"{name} is a link out of .*: put the file itself there"):
            loras.find(name, lora_dir)
    (lora_dir / "round.safetensors").symlink_to("round.safetensors")
    with pytest.raises(RequestError, match=r"there is no round.safetensors"):
        loras.find("round.safetensors", lora_dir)


def test_what_is_recorded_says_what_the_file_held_and_what_matched(lora_dir: Path) -> None:
    (entry,) = loras.take_in(chosen({"file": "styles/oil.safetensors", "weight": 0.8}), lora_dir, DEMO)
    assert entry["file"] == "styles/oil.safetensors"
    assert len(entry["sha256"]) == 64
    assert (entry["matched"] > 50, entry["unmatched"]) == (True, 0)
    assert loras.in_words(entry) == (
        f"styles/oil.safetensors, weight 0.8, matched {entry['matched']} of {entry['matched']}"
    )
    (asked,) = loras.requested({"loras": [entry]}, lora_dir)
    assert (asked.file, asked.weight, asked.sha256) == (
        lora_dir / "styles/oil.safetensors",
        0.8,
        entry["sha256"],
    )


def test_without_the_models_files_matching_is_left_to_the_worker(lora_dir: Path) -> None:
    absent = ModelSpec("mine", "framepack", Source("/nowhere"), DEMO.base, DEMO.image_encoder)
    (entry,) = loras.take_in(chosen("styles/oil.safetensors"), lora_dir, absent)
    assert entry.keys() == {"file", "weight", "sha256"}
    assert loras.in_words(entry) == "styles/oil.safetensors, weight 1"


def test_one_that_does_not_fit_is_refused_at_intake(lora_dir: Path) -> None:
    save_file({"down_blocks.0.lora_A.weight": torch.ones(2, 2)}, lora_dir / "sd.safetensors")
    with pytest.raises(RequestError, match=r"sd.safetensors does not fit .*down_blocks.0.lora_A.weight"):
        loras.take_in(chosen("sd.safetensors"), lora_dir, DEMO)


def test_one_that_fits_in_part_is_refused_at_intake_unless_its_setting_allows_that(lora_dir: Path) -> None:
    strange = {"lora_unet_double_blocks_7_img_mlp_fc1.lora_up.weight": torch.ones(1, 1)}
    make_lora(lora_dir / "deep.safetensors", "kohya-hunyuan", stored(DEMO), only="linear2", extra=strange)
    with pytest.raises(RequestError, match=r"deep.safetensors fits .* only in part.*allow_partial = true"):
        loras.take_in(chosen("deep.safetensors"), lora_dir, DEMO)
    allowed = chosen({"file": "deep.safetensors", "allow_partial": True})
    (entry,) = loras.take_in(allowed, lora_dir, DEMO)
    assert (entry["allow_partial"], entry["unmatched"]) == (True, 1)
    assert loras.in_words(entry).endswith(f"matched {entry['matched']} of {entry['matched'] + 1}")
    (asked,) = loras.requested({"loras": [entry]}, lora_dir)
    assert asked.allow_partial, "the worker comes to the same verdict"


def test_one_of_another_family_is_refused_at_intake(lora_dir: Path) -> None:
    metadata = {"modelspec.architecture": "flux-1-dev/lora"}
    make_lora(lora_dir / "flux.safetensors", "kohya-hunyuan", stored(DEMO), metadata=metadata)
    absent = ModelSpec("mine", "framepack", Source("/nowhere"), DEMO.base, DEMO.image_encoder)
    for spec in (DEMO, absent):
        with pytest.raises(RequestError, match=r"flux.safetensors was made for FLUX.1"):
            loras.take_in(chosen("flux.safetensors"), lora_dir, spec)


def test_an_extension_may_be_in_capitals(lora_dir: Path) -> None:
    make_lora(lora_dir / "X.SAFETENSORS", "diffusers", stored(DEMO))
    (entry,) = loras.take_in(chosen("X.SAFETENSORS"), lora_dir, DEMO)
    assert (entry["file"], entry["unmatched"]) == ("X.SAFETENSORS", 0)
    assert "X.SAFETENSORS" in loras.listing(lora_dir)


def test_records_from_before_all_keys_were_counted_are_described() -> None:
    entry = {"file": "a.safetensors", "weight": 1.0, "sha256": "1" * 64, "matched": 108, "unmatched": 12}
    assert loras.in_words(entry) == "a.safetensors, weight 1, matched 108 of 120"
    (asked,) = loras.requested({"loras": [entry]}, Path("loras"))
    assert not asked.allow_partial


def test_the_fingerprint_holds_content_and_weight_and_no_names() -> None:
    one = {"file": "a.safetensors", "weight": 0.8, "sha256": "1" * 64, "matched": 3, "unmatched": 0}
    two = {"file": "b.safetensors", "weight": 1.0, "sha256": "2" * 64}
    renamed = {"file": "c.safetensors", "weight": 0.8, "sha256": "1" * 64}
    same = loras.decisive({"steps": 1, "loras": [one, two]})
    assert same == loras.decisive({"steps": 1, "loras": [two, renamed]})
    assert same == loras.decisive({"steps": 1, "loras": [two, one | {"keys": 3, "allow_partial": True}]})
    assert same != loras.decisive({"steps": 1, "loras": [two, renamed | {"weight": 0.7}]})
    assert same != loras.decisive({"steps": 1, "loras": [two, renamed | {"sha256": "3" * 64}]})
    assert loras.decisive({"steps": 1, "loras": []}) == {"steps": 1}, "as before there were any"


def test_check_says_which_are_there_and_misses_those_of_the_defaults(lora_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    text = f'model = "demo"\nstate_dir = "{tmp_path}"\n'

    def said(*options: str) -> str:
        config.write_text(text)
        return CliRunner().invoke(main, ["check", "--no-gpu", "--config", str(config), *options]).stdout

    assert "there are styles/oil.safetensors" in said()
    text += '[defaults]\nloras = ["styles/oil.safetensors"]\n'
    assert "memory plan" in said("--vram", "24")
    text = text.partition("[")[0]
    text += '[defaults]\nloras = [{file = "gone.safetensors"}]\n'
    assert "[defaults] loras: there is no gone.safetensors" in said()
