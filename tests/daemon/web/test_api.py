"""The endpoints of FramePack's demo, called as scripts do, with gradio's own client."""

import asyncio
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from framepackd.settings.config import load_config
from framepackd.web import api
from tests.acceptance.conftest import Daemon, picture
from tests.daemon.web.conftest import Web


@pytest.fixture
def client(web: Web) -> Client:
    return Client(web.url, verbose=False)


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return handle_file(str(picture(tmp_path_factory.mktemp("pictures") / "cat.png")))


def records(daemon: Daemon) -> set[Path]:
    return set(daemon.outbox.glob("web/*.json"))


def test_arguments_without_names_are_taken_in_the_order_of_the_demo(
    tiny_daemon: Daemon, client: Client, cat: Any
) -> None:
    before = records(tiny_daemon)
    in_order = (cat, "pan left", "blurry", 7, 1, 3, 2, 1.5, 9, 0.5, 6, False, 20)
    result = client.predict(*in_order, api_name="/process")
    (path,) = records(tiny_daemon) - before
    assert Path(result[0]["video"]).stem == path.stem
    made = json.loads(path.read_text())
    expected = {
        **{"prompt": "pan left", "negative_prompt": "blurry", "seed": 7, "seconds": 1, "steps": 2, "crf": 20},
        **{"latent_window_size": 3, "true_cfg_scale": 1.5, "guidance_scale": 9, "guidance_rescale": 0.5},
        **{"gpu_memory_preservation": 6, "cache": "none"},
    }
    assert {key: made[key] for key in expected} == expected


def test_end_process_ends_what_this_client_waits_for_and_nothing_else(
    tiny_daemon: Daemon, client: Client, web: Web, cat: Any
) -> None:
    assert "nothing to end" in client.predict(api_name="/end_process")
    asked = {"input_image": cat, "prompt": "pan left", "total_second_length": 60, "steps": 100}
    waiting = client.submit(**asked, api_name="/process")
    tiny_daemon.until(lambda: "running" in str(waiting.outputs()[-1:]), "the video to be begun")
    other = Client(web.url, verbose=False)
    assert "nothing to end" in other.predict(api_name="/end_process")
    assert not waiting.done()
    assert "is then cancelled" in client.predict(api_name="/end_process")
    with pytest.raises(AppError, match="cancelled"):
        waiting.result(timeout=60)
    assert "nothing to end" in client.predict(api_name="/end_process")


def test_end_process_ends_a_job_that_is_not_in_the_queue_yet(
    tiny_daemon: Daemon, client: Client, cat: Any
) -> None:
    waiting = client.submit(
        input_image=cat, prompt="pan left", total_second_length=60, steps=100, api_name="/process"
    )
    tiny_daemon.until(lambda: bool(waiting.outputs()), "the drop")
    assert "cancelled" in client.predict(api_name="/end_process")
    with pytest.raises(AppError, match="cancelled"):
        waiting.result(timeout=60)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 400}, "the settings: steps must be 1 to 100, got 400"),
        ({"steps": "many"}, "steps must be a whole number from 1 to 100, got 'many'"),
        ({"seed": "rnd"}, "seed must be a whole number from 0 to 4294967295, or \"random\", got 'rnd'"),
        ({"mp4_crf": 99}, "mp4_crf must be 0 to 51, got 99"),
        ({"use_teacache": "maybe"}, "use_teacache must be true or false, got 'maybe'"),
        ({"input_image": None}, "input_image is missing: give a picture"),
        ({"input_image": "cat.png"}, 'a picture must be a file, as handle_file("cat.png") gives it, got '),
        ({"end_frame": 3}, 'a picture must be a file, as handle_file("cat.png") gives it, got 3'),
        ({"prompt": "x" * 70_000}, "the prompt has 70000 bytes"),
    ],
)
def test_a_mistake_reaches_the_script_as_a_sentence(
    client: Client, cat: Any, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(AppError) as told:
        client.predict(**{"input_image": cat, "prompt": "pan left"} | asked, api_name="/process")
    assert said in str(told.value)


def test_a_picture_that_cannot_be_read_reaches_the_script_in_words_and_the_log_without_a_traceback(
    client: Client, web: Web, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(b"hello")
    logged = web.log.stat().st_size
    with pytest.raises(AppError, match=r"failed: .*\.png is not a picture that can be read: save it as PNG"):
        client.predict(
            input_image=handle_file(str(tmp_path / "cat.png")), prompt="pan left", api_name="/process"
        )
    assert "Traceback" not in web.log.read_text()[logged:]


def test_a_script_hears_that_no_daemon_runs_and_its_job_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited without a word, for ever."""
    (tmp_path / "config.toml").write_text('state_dir = "state"\ninbox = "inbox"\n')
    (tmp_path / "inbox").mkdir()
    monkeypatch.setattr(api, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(api, "ALONE_SECONDS", 0.05)
    calls: api.Calls = defaultdict(set)
    process = api.make_process(load_config(tmp_path / "config.toml"), calls)
    began = time.monotonic()

    async def call() -> None:
        async for _, progress in process(str(picture(tmp_path / "cat.png")), "pan left"):
            assert "no daemon runs" in progress
            assert calls[None]

    with pytest.raises(gr.Error, match=r"until framepackd run is started; it is web/pan-left-.*Do not ask"):
        asyncio.run(call())
    assert time.monotonic() - began >= 0.05
    assert len(list((tmp_path / "inbox/web").iterdir())) == 3
    assert not calls[None]
