"""The page in a real browser: what people do on it, and what it must never do."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.acceptance.conftest import Daemon, environment, picture
from tests.core.media.photo import PHOTO
from tests.daemon.web.conftest import CHROMIUM, EVERYBODY, Web, free_port, in_a_browser, status

PATIENCE = 90_000  # ms


@pytest.fixture
def page(web: Web) -> Iterator[Page]:
    """Open the page; every request to elsewhere, and every error in it, fails the test."""
    elsewhere: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(web.url)
        yield page
        browser.close()
    assert not [url for url in elsewhere if not url.startswith((web.url, "data:", "blob:"))]
    assert not errors


@in_a_browser
def test_a_picture_and_a_prompt_become_a_video_that_plays_on_the_page(
    page: Page, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    evil = "<img src=x onerror=document.title='evil'>"
    page.locator("input[type=file]").first.set_input_files(picture(tmp_path / f"{evil.replace('/', '')}.png"))
    page.get_by_label("Prompt", exact=True).first.fill(f"pan left {evil}")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("In the inbox as")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#now")).to_contain_text("section", timeout=PATIENCE)
    expect(page.locator("video").last).to_be_visible(timeout=PATIENCE)
    tiny_daemon.until(lambda: bool(list(tiny_daemon.outbox.glob("web/*.mp4"))), "the video")
    expect(page.locator("#now")).to_contain_text("Nothing is being made", timeout=PATIENCE)
    expect(page.get_by_text("How it was made")).to_be_visible(timeout=PATIENCE)
    plays = "video => new Promise(done => {video.oncanplay = () => done(video.duration); video.load()})"
    assert page.locator("video").last.evaluate(plays) == pytest.approx(145 / 30, abs=0.1)
    assert page.title() == "framepackd", "nothing that a job brought along was run"
    (text,) = tiny_daemon.outbox.glob("web/*.txt")
    assert text.read_text() == f"pan left {evil}"


AS_UPLOADED = """
import sys
import pathlib
import gradio as gr
from gradio.data_classes import ImageData
from framepackd.settings.config import load_config
from framepackd.web.page import build

photo, folder = sys.argv[1:]
blocks = build(load_config(), pathlib.Path(folder)).blocks.values()
pictures = [block for block in blocks if isinstance(block, gr.Image) and block.interactive is not False]
assert len(pictures) == 2
for one in pictures:
    assert one.preprocess(ImageData(path=photo, orig_name="photo.heic")) == photo
    assert one.preprocess(None) is None
"""


def test_a_picture_that_gradio_cannot_read_comes_to_the_inbox_as_it_was_uploaded(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", AS_UPLOADED, str(PHOTO), str(tmp_path)], check=True, timeout=120)


@in_a_browser
def test_the_queue_can_be_paused_and_a_job_cancelled_and_made_again(page: Page, tiny_daemon: Daemon) -> None:
    page.get_by_role("button", name="Pause the queue").click()
    expect(page.locator("#now")).to_contain_text("Paused", timeout=PATIENCE)
    tiny_daemon.drop("cat", seconds=1, steps=1)
    job = page.get_by_label("Job", exact=True)
    expect(page.locator("#now")).to_contain_text("1 queued", timeout=PATIENCE)
    job.click()
    page.get_by_role("option", name="cat").click()
    page.get_by_role("button", name="Cancel").click()
    tiny_daemon.until(lambda: (tiny_daemon.failed / "cat.cancelled.txt").exists(), "the cancelled job")
    expect(page.get_by_label("Result", exact=True)).to_have_value(re.compile("^cat "), timeout=PATIENCE)
    page.get_by_role("button", name="Make it again").click()
    page.get_by_role("button", name="Go on").click()
    tiny_daemon.until(lambda: (tiny_daemon.outbox / "cat.mp4").exists(), "the job, made again")


@pytest.mark.parametrize("options", [["--server", EVERYBODY], ["--share"]])
def test_others_are_let_in_with_a_password_only(tiny_daemon: Daemon, options: list[str]) -> None:
    done = tiny_daemon.command("web", "--port", str(free_port()), *options)
    assert done.returncode == 2
    assert "set a password" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_a_one_line_error(tiny_daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tiny_daemon.command("web", "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize("path", ["config.toml", "state/framepackd.db", "outbox/../config.toml", "inbox"])
def test_files_outside_the_outbox_are_not_served(tiny_daemon: Daemon, web: Web, path: str) -> None:
    for wanted in (tiny_daemon.root / path, f"/etc/passwd#{path}"):
        assert status(f"{web.url}gradio_api/file={str(wanted).replace('..', '%2e%2e')}") in (403, 404)


def test_the_page_loads_no_model_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from framepackd.settings.config import Config\n"
        "from framepackd.web.page import build\n"
        f"build(Config(state_dir={str(tmp_path)!r}), Path({str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment(), check=True, timeout=120)
