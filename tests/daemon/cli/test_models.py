"""The models command: what is listed, fetched and verified, from a hub on this machine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.acceptance.conftest import environment
from tests.daemon.cli.fake_hub import COMMIT, FakeHub, etag
from tests.daemon.reports.queue import until
from tests.golden import TINY_MODELS

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"
UNUSED = (
    "transformer/diffusion_pytorch_model.safetensors",
    "README.md",
    "vae/weights.bin",
    "vae/._diffusion_pytorch_model.safetensors",
)

Models = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """Serve a copy of the tiny model; much of its base is not used."""
    published = tmp_path / "published"
    shutil.copytree(TINY_MODELS, published)
    for name in UNUSED:
        (published / "hunyuanvideo" / name).parent.mkdir(exist_ok=True)
        (published / "hunyuanvideo" / name).write_bytes(b"x" * 1000)
    folders = {"me/mine": "framepack-i2v", "me/base": "hunyuanvideo", "me/redux": "flux_redux"}
    with FakeHub({name: published / folder for name, folder in folders.items()}) as hub:
        yield hub


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Configure a model of the user's, from that hub."""
    file = tmp_path / "config.toml"
    file.write_text(
        f'state_dir = "state"\nmodel = "mine"\n[models.mine]\nkind = "framepack"\nrevision = "{COMMIT}"\n'
        f'transformer = "me/mine"\nbase = "me/base@{COMMIT}"\nimage_encoder = "me/redux@{COMMIT}"\n'
    )
    return file


def surroundings(hub: FakeHub, config: Path) -> dict[str, str]:
    return environment() | {
        "HF_HOME": str(config.parent / "hf"),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "",
    }


@pytest.fixture
def models(hub: FakeHub, config: Path) -> Models:
    """Run framepackd models, in a process of its own, which must not load torch."""
    code = (
        "import sys; from framepackd.cli.main import main\n"
        "try: main(sys.argv[1:], prog_name='framepackd')\n"
        "finally: assert 'torch' not in sys.modules"
    )

    def run(command: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", code, "models", command, "--config", str(config), *words],
            capture_output=True,
            text=True,
            env=surroundings(hub, config) | variables,
            check=False,
            timeout=60,
        )

    return run


def mine(models: Models, *words: str) -> dict[str, Any]:
    """Give what is listed of the model."""
    listed = json.loads(models("list", "--json", *words).stdout)
    return next(model for model in listed["models"] if model["name"] == "mine")


def test_only_needed_files_are_fetched_and_their_size_is_said_before(
    models: Models, hub: FakeHub, config: Path
) -> None:
    before = mine(models)
    assert not before["complete"]
    sizes = [source["bytes_to_fetch"] for source in before["sources"]]
    fetched = models("download")
    assert fetched.returncode == 0, fetched.stderr
    assert "to fetch into" in fetched.stdout
    assert "free there" in fetched.stdout
    assert not {name for name in hub.fetched if name in UNUSED}
    after = mine(models)
    assert after["complete"]
    assert [source["bytes_here"] for source in after["sources"]] == sizes
    assert [source["bytes_to_fetch"] for source in after["sources"]] == [0, 0, 0]
    hub.fetched.clear()
    assert models("download").returncode == 0
    assert not hub.fetched, "what is here is not fetched again"


def test_a_download_resumes_after_its_connection_broke_off(models: Models, hub: FakeHub) -> None:
    hub.break_off[SHARD] = 1000
    fetched = models("download")
    assert fetched.returncode == 0, fetched.stderr
    assert hub.fetched.count(SHARD) == 2
    assert models("verify").returncode == 0


def test_a_killed_download_resumes_inside_its_file(models: Models, hub: FakeHub, config: Path) -> None:
    shard = hub.repositories["me/mine"] / SHARD
    padding = {"padding": np.zeros(24_500_000, np.uint8)}  # the client writes 10 MiB at a time
    save_file(load_file(shard) | padding, shard)
    hub.hang[SHARD] = 12_000_000
    arguments = [sys.executable, "-m", "framepackd", "models", "download", "--config", str(config)]
    process = subprocess.Popen(
        arguments, env=surroundings(hub, config), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert hub.hanging.wait(30)
        until(lambda: [part.stat().st_size for part in parts(config)] == [10 << 20], "what came")
    finally:
        process.kill()
        process.communicate()
    (part,) = parts(config)
    kept = part.stat().st_size
    assert SHARD in mine(models)["sources"][0]["missing"]
    whole = {name for name in hub.fetched if name != SHARD}
    assert whole
    hub.hang.clear()
    hub.fetched.clear()
    fetched = models("download")
    assert fetched.returncode == 0, fetched.stderr
    assert "10.5 MB of that are here from an interrupted download" in fetched.stdout
    assert f"{SHARD} from {kept}" in hub.fetched
    assert not ({SHARD} | whole) & set(hub.fetched)
    assert parts(config) == []
    assert models("verify").returncode == 0


def parts(config: Path) -> list[Path]:
    return list(config.parent.glob("hf/hub/*/blobs/*.part"))


def test_weights_that_arrive_damaged_are_refused(models: Models, hub: FakeHub, config: Path) -> None:
    assert models("download").returncode == 0
    blob = (config.parent / "hf/hub/models--me--mine/snapshots" / COMMIT / SHARD).resolve()
    content = blob.read_bytes()
    blob.unlink()
    blob.with_name(f"{blob.name}.part").write_bytes(b"x" + content[1:1000])
    refused = models("download")
    assert refused.returncode == 1
    assert f"{SHARD} arrived damaged" in refused.stderr
    assert "run the command again" in refused.stderr
    assert not blob.exists()
    assert models("download").returncode == 0
    assert blob.read_bytes() == content


def test_leftovers_of_downloads_by_other_programs_are_removed(models: Models, config: Path) -> None:
    blobs = config.parent / "hf/hub/models--me--mine/blobs"
    blobs.mkdir(parents=True)
    (config.parent / "hf/hub/.locks/models--me--mine").mkdir(parents=True)
    left = blobs / f"{'0' * 64}.1234abcd.incomplete"
    left.write_bytes(b"x" * 5000)
    fetched = models("download")
    assert fetched.returncode == 0, fetched.stderr
    assert "5.0 kB removed that an interrupted download left" in fetched.stdout
    assert not left.exists()


def test_verify_names_damaged_and_missing_files_and_the_command_that_mends_them(
    models: Models, hub: FakeHub, config: Path
) -> None:
    assert models("download").returncode == 0
    fine = models("verify", HF_HUB_OFFLINE="1")
    assert fine.returncode == 0, fine.stderr
    assert "as published" in fine.stdout
    assert "without" not in fine.stdout
    cache = config.parent / "hf/hub/models--me--mine"
    shard = cache / "snapshots" / COMMIT / SHARD
    text = config.parent / "hf/hub/models--me--base/snapshots" / COMMIT / "tokenizer_2/merges.txt"
    gone = config.parent / "hf/hub/models--me--redux/snapshots" / COMMIT / "image_encoder/config.json"
    for path in (shard, text):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.resolve().write_bytes(content)
    gone.resolve().unlink()
    found = models("verify", HF_HUB_OFFLINE="1")
    assert found.returncode == 1
    assert f"damaged: {shard}: " in found.stderr
    assert f"damaged: {text}: " in found.stderr
    assert f"missing: {gone}\n" in found.stderr
    assert found.stderr.count("damaged: ") == 2
    assert shard.exists(), "nothing is removed by itself"
    for line in found.stderr.splitlines():
        if "to fetch it again: rm " in line:
            remove, _, again = line.partition("rm ")[2].partition(" && ")
            assert again == "framepackd models download mine"
            Path(remove).unlink()
    assert models("download").returncode == 0
    assert models("verify").returncode == 0
    assert etag(shard) == shard.readlink().name


def test_offline_the_hub_is_not_asked_and_missing_files_are_listed(models: Models, hub: FakeHub) -> None:
    for words, variables in ((("--offline",), {}), ((), {"HF_HUB_OFFLINE": "1"})):
        refused = models("download", *words, **variables)
        assert refused.returncode == 1
        assert "me/base" in refused.stdout
        assert "vae/config.json" in refused.stdout
        assert "offline" in refused.stderr
    assert mine(models, "--offline")["sources"][0]["bytes_to_fetch"] is None
    assert not hub.fetched
    assert models("download").returncode == 0
    whole = models("download", "--offline")
    assert (whole.returncode, whole.stdout) == (0, "every file is here\n")


def test_a_download_that_does_not_fit_on_the_disk_is_refused_before_it_begins(
    models: Models, hub: FakeHub, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (hub.repositories["me/mine"] / SHARD).open("ab") as shard:
        shard.truncate(1 << 42)  # 4 TiB, of which none is on the disk
    monkeypatch.setattr("tests.daemon.cli.fake_hub.etag", lambda _: "0" * 64)
    refused = models("download")
    assert refused.returncode == 1
    assert "set HF_HOME to a folder on a larger disk" in refused.stderr
    assert not hub.fetched


def test_the_users_own_folder_is_compared_with_the_lengths_in_its_headers(
    models: Models, config: Path
) -> None:
    folders = config.parent / "published"
    config.write_text(
        f'model = "mine"\n[models.mine]\nkind = "framepack"\ntransformer = "{folders}/framepack-i2v"\n'
        f'base = "{folders}/hunyuanvideo"\nimage_encoder = "{folders}/flux_redux"\n'
    )
    fine = models("verify")
    assert fine.returncode == 0, fine.stderr
    shard = folders / "framepack-i2v" / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])
    found = models("verify")
    assert found.returncode == 1
    assert f"damaged: {shard}: " in found.stderr
    shard.unlink()
    assert f"missing: {shard}\n  put it there" in models("verify").stderr


MODEL = """
kind = "f1"
transformer = "{}"
base = "{folders}/hunyuanvideo"
image_encoder = "{folders}/flux_redux"
"""


def test_the_users_own_file_is_listed_and_compared_with_the_model(models: Models, config: Path) -> None:
    """A file may be as long as its header says and still not fit."""
    folders = config.parent / "published"
    tensors = load_file(folders / "framepack-f1" / "diffusion_pytorch_model.safetensors")
    file = folders / "framepack-f1" / "FramePack_F1.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, file)
    (folders / "framepack-f1" / "._FramePack_F1.safetensors").write_bytes(b"left by macOS")
    config.write_text(f'model = "mine"\n[models.mine]{MODEL.format(file, folders=folders)}')
    listed = mine(models, "--offline")
    assert listed["complete"]
    assert listed["sources"][0]["bytes_here"] == file.stat().st_size
    fine = models("verify")
    assert fine.returncode == 0, fine.stderr
    tensors.pop("proj_out.bias")
    save_file(tensors, file)
    found = models("verify")
    assert found.returncode == 1
    unfit = f"unfit: {file} has 1 missing weights of 148, the first proj_out.bias"
    assert unfit in found.stderr
    assert mine(models, "--offline")["error"].startswith(unfit)
    assert "unfit: see below" in models("list", "--offline").stdout
    page = config.parent / "page.safetensors"
    page.write_text("<!DOCTYPE html><html>log in</html>")
    config.write_text(config.read_text() + f"[models.other]{MODEL.format(page, folders=folders)}")
    both = models("verify", "mine", "other").stderr
    assert unfit in both, "what is wrong with one model hides nothing of another"
    assert f"damaged: {page}: it is an HTML page" in both


def test_the_table_says_what_is_complete(models: Models) -> None:
    table = models("list", "--offline").stdout
    assert "mine *" in table
    assert "complete" in table, "the demo model"
    unknown = models("download", "nope")
    assert unknown.returncode == 2
    assert "model must be one of demo, demo-f1, f1, framepack, mine, got 'nope'" in unknown.stderr
