"""The page in a real browser: what people do on it, and what it must never do."""

import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from framepackd import web as wing
from framepackd.cli import demo
from framepackd.control import client
from framepackd.settings.config import load_config
from framepackd.web import actions
from tests.acceptance.conftest import Daemon, environment, picture
from tests.core.models.loras import make_lora, stored
from tests.daemon.web.conftest import CHROMIUM, EVERYBODY, Web, free_port, in_a_browser, status

PATIENCE = 60_000  # ms
expect.set_options(timeout=PATIENCE)
EMPTY = "Say what moves, in a sentence."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, web: Web) -> Iterator[Page]:
    """Open the page; whatever it asks for from elsewhere, and every error in it, fails the test."""
    elsewhere: list[str] = []
    errors: list[str] = []
    context = browser.new_context(reduced_motion="no-preference")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if "Content Security" in said.text else None)
    page.goto(web.url)
    yield page
    context.close()
    assert not [url for url in elsewhere if not url.startswith((web.url, "data:", "blob:"))]
    assert not errors


def fill(page: Page, url: str, cat: Path, prompt: str) -> None:
    page.goto(f"{url}make")
    page.locator("#pictures").set_input_files(cat)
    page.get_by_label("What happens?").fill(prompt)


@in_a_browser
def test_a_picture_and_a_sentence_become_a_video_that_plays_on_the_page(
    page: Page, web: Web, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    evil = "<img src=x onerror=document.title='evil'>"
    fill(page, web.url, picture(tmp_path / f"{evil.replace('/', '')}.png"), f"pan left {evil}")
    expect(page.locator("#cost")).to_contain_text("on this card")
    page.get_by_role("button", name="Make video").click()
    expect(page.get_by_text("in the queue in")).to_be_visible(timeout=PATIENCE)
    page.goto(web.url)
    expect(page.locator(".stage")).to_contain_text("pan left <img")
    tiny_daemon.until(lambda: bool(list(tiny_daemon.outbox.glob("web/*.mp4"))), "the video")
    expect(page.locator("#now")).to_contain_text("Nothing is being made")
    page.locator("#fresh .tile a").first.click()
    expect(page.get_by_text("How it was made")).to_be_visible(timeout=PATIENCE)
    plays = "video => new Promise(done => {video.oncanplay = () => done(video.duration); video.load()})"
    assert page.locator("video").last.evaluate(plays) == pytest.approx(25 / 30, abs=0.1)
    assert page.title() != "evil", "nothing that a job brought along was run"
    (text,) = tiny_daemon.outbox.glob("web/*.txt")
    assert text.read_text() == f"pan left {evil}"


@in_a_browser
def test_the_form_says_at_its_fields_what_is_wrong_and_two_clicks_make_one_job(
    page: Page, web: Web, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    page.goto(f"{web.url}make")
    go = page.get_by_role("button", name="Make video")
    go.click()
    expect(page.locator("#err-pictures")).to_contain_text("Give a picture first")
    page.locator("#pictures").set_input_files(picture(tmp_path / "cat.png"))
    go.click()
    expect(page.locator("#err-prompt")).to_contain_text(EMPTY)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.get_by_label("What happens?").fill("the cat jumps twice")
    page.locator("#seed").fill("many")
    go.click()
    expect(page.locator("#err-seed")).to_contain_text("'many' is neither")
    page.locator("#seed").fill("7")
    go.dblclick()
    expect(page.get_by_text("in the queue in")).to_be_visible(timeout=PATIENCE)
    dropped = [*tiny_daemon.inbox.glob("web/the-cat-jumps*.toml")]
    tiny_daemon.until(
        lambda: sum("the-cat-jumps" in job["name"] for job in tiny_daemon.status()["jobs"]) == 1, "one job"
    )
    assert len(dropped) <= 1
    tiny_daemon.until(lambda: bool(list(tiny_daemon.outbox.glob("web/the-cat*.mp4"))), "the video")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.locator("#pictures").set_input_files(broken)
    expect(page.locator("#err-pictures")).to_contain_text("broken.png cannot be read")
    broken.write_bytes((tmp_path / "cat.png").read_bytes()[:700])  # a browser shows what there is of it
    page.get_by_role("button", name="Remove broken.png").click()
    page.locator("#pictures").set_input_files(broken)
    page.get_by_label("What happens?").fill("it breaks")
    go.click()
    expect(page.locator("#err-pictures")).to_contain_text("broken.png is damaged")


@in_a_browser
def test_the_queue_is_ordered_by_keyboard_and_two_tabs_agree(
    page: Page, browser: Browser, web: Web, tiny_daemon: Daemon
) -> None:
    assert tiny_daemon.command("pause").returncode == 0
    page.goto(web.url)  # where nothing was ever made, it greets and has no line
    expect(page.locator("#line")).to_contain_text("Paused")
    for number in range(12):
        tiny_daemon.drop(f"cat-{number:02d}", prompt=f"cat number {number}", seconds=1, steps=1)
    expect(page.locator(".job")).to_have_count(12)
    other = browser.new_page()
    other.goto(web.url)
    names = [text.split(" · ")[0] for text in page.locator(".job .facts").all_inner_texts()]
    page.locator(".job .grip").nth(3).focus()
    for key in ("Space", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    expect(page.locator("#toast")).to_contain_text("Place 2 of 12")
    page.keyboard.press("Space")
    wanted = [names[0], names[3], names[1], names[2], *names[4:]]
    for tab in (page, other):
        expect(tab.locator(".job .facts")).to_have_text([re.compile(rf"^\s*{name}\s") for name in wanted])
    page.locator(".job").nth(11).get_by_role("button", name="to the front").click()
    expect(other.locator(".job .facts").first).to_have_text(re.compile(rf"^\s*{names[11]}\s"))
    page.reload()
    expect(page.locator(".job .facts").first).to_have_text(re.compile(rf"^\s*{names[11]}\s"))
    page.locator(".job").first.get_by_role("button", name="cancel").click()
    page.keyboard.press("Escape")
    expect(page.locator(".ask.asking")).to_have_count(0)
    page.locator(".job").first.get_by_role("button", name="cancel").click()
    page.get_by_role("button", name="Take it out").first.click()
    expect(other.locator(".job")).to_have_count(11)
    tiny_daemon.until(
        lambda: (tiny_daemon.failed / f"{names[11]}.cancelled.txt").exists(), "the cancelled job"
    )
    other.close()
    page.get_by_role("button", name="Go on").click()
    ends = page.locator(".job .at time")
    expect(ends.first).to_be_visible(timeout=PATIENCE)
    left = [job["id"] for job in tiny_daemon.status()["jobs"] if job["state"] == "queued"]
    client.perform(load_config(tiny_daemon.config), {"command": "cancel", "jobs": left})
    tiny_daemon.until(lambda: tiny_daemon.status()["counts"]["queued"] == 0, "the queue")


@in_a_browser
def test_what_is_missing_and_a_wrong_setting_are_put_right_on_the_page(
    page: Page, web: Web, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    for number in (0, 1, 3):
        picture(tiny_daemon.inbox / f"walk_frame_{number}.png", number)
    (tiny_daemon.inbox / "walk.toml").write_text('prompt = "it walks"\nsteps = 1\nseconds = 1\n')
    page.get_by_label("Picture walk_frame_2.png").set_input_files(picture(tmp_path / "third.webp", 2))
    page.locator(".need", has_text="walk").get_by_role("button", name="Add it").click()
    expect(page.locator("#toast")).to_contain_text("Added as walk_frame_2.webp")
    tiny_daemon.until(lambda: (tiny_daemon.outbox / "walk.mp4").exists(), "the chain")
    assert (tiny_daemon.outbox / "walk_frame_2.webp").read_bytes() == (tmp_path / "third.webp").read_bytes()
    picture(tiny_daemon.inbox / "wren.png")
    (tiny_daemon.inbox / "wren.toml").write_text("steps = 1\nseconds = 1\n")
    page.get_by_label("Sentence for wren").fill("The wren hops.")
    page.get_by_label("Sentence for wren").blur()
    tiny_daemon.drop("dove", seconds=1, steps=0)
    expect(page.locator("#needs")).to_contain_text("dove.toml: steps must be")
    expect(page.get_by_label("Sentence for wren")).to_have_value("The wren hops.")
    assert tiny_daemon.command("dismiss", "dove").returncode == 0
    page.get_by_role("button", name="Add it").click()
    tiny_daemon.until(lambda: (tiny_daemon.outbox / "wren.mp4").exists(), "the video")
    assert (tiny_daemon.outbox / "wren.txt").read_text() == "The wren hops.\n"
    tiny_daemon.drop("robin")
    (tiny_daemon.inbox / "robin.toml").write_text("# by hand\nseconds = 1\nsteps = 101\n")
    expect(page.locator("#needs")).to_contain_text("robin.toml: steps must be")
    steps = page.locator(".need", has_text="robin").get_by_label("steps")
    expect(steps).to_have_value("100")
    steps.fill("0")
    again = page.get_by_role("button", name="Try again with it")
    again.click()
    expect(page.locator("#toast")).to_contain_text("steps must be 1 to 100, got 0")
    steps.fill("1")
    again.click()
    tiny_daemon.until(lambda: (tiny_daemon.outbox / "robin.mp4").exists(), "the video")
    assert (tiny_daemon.outbox / "robin.toml").read_text() == "# by hand\nseconds = 1\nsteps = 1\n"


@in_a_browser
def test_a_failure_that_is_put_away_is_shown_no_more_and_its_files_stay(
    page: Page, tiny_daemon: Daemon
) -> None:
    tiny_daemon.drop("raven", model="none")
    page.locator(".need", has_text="raven").get_by_role("button", name="Put away").click()
    expect(page.locator("#toast")).to_contain_text("Put away")
    expect(page.locator(".need", has_text="raven")).to_have_count(0)
    page.reload()
    expect(page.locator(".need", has_text="raven")).to_have_count(0)
    assert {path.suffix for path in tiny_daemon.failed.glob("raven*")} == {".png", ".txt", ".toml"}
    assert not [job for job in tiny_daemon.status()["jobs"] if job["name"] == "raven" and job["open"]]


@in_a_browser
def test_a_job_has_the_style_and_the_end_frame_that_the_form_gave_it(
    page: Page, web: Web, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    config = load_config(tiny_daemon.config)
    config.lora_dir.mkdir(exist_ok=True)
    make_lora(config.lora_dir / "oil.safetensors", "kohya-hunyuan", stored(config.spec("tiny")))
    fill(page, web.url, picture(tmp_path / "swan.png"), "the swan turns")
    page.get_by_label("LoRA", exact=True).first.select_option("oil")
    page.get_by_label("Weight").first.fill("0.5")
    end = picture(tmp_path / "end.png", 1)
    page.locator("#end").set_input_files(end)
    page.get_by_role("button", name="Make video").click()
    tiny_daemon.until(lambda: bool(list(tiny_daemon.outbox.glob("web/the-swan*.mp4"))), "the video")
    (path,) = tiny_daemon.outbox.glob("web/the-swan*.json")
    record = json.loads(path.read_text())
    assert [(lora["file"], lora["weight"]) for lora in record["loras"]] == [("oil.safetensors", 0.5)]
    assert record["inputs"]["end"]["sha256"] == hashlib.sha256(end.read_bytes()).hexdigest()


@in_a_browser
def test_without_scripts_the_buttons_work(
    browser: Browser, web: Web, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{web.url}make")
    page.locator("#pictures").set_input_files(picture(tmp_path / "dog.png"))
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#err-prompt")).to_contain_text(EMPTY)
    page.locator("#pictures").set_input_files(picture(tmp_path / "dog.png"))
    page.get_by_label("What happens?").fill("the dog barks")
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#toast")).to_contain_text("in the inbox")
    tiny_daemon.until(lambda: bool(list(tiny_daemon.outbox.glob("web/the-dog*.mp4"))), "the video")
    page.goto(web.url)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#toast")).to_contain_text("Paused")
    assert tiny_daemon.status()["daemon"]["paused"]
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#toast")).to_contain_text("Going on")
    context.close()


@in_a_browser
def test_a_draft_is_asked_for_found_and_made_final_on_the_page(
    page: Page, web: Web, tiny_daemon: Daemon, tmp_path: Path
) -> None:
    fill(page, web.url, picture(tmp_path / "heron.png"), "the heron fishes")
    page.get_by_label("As a draft first").check()
    page.get_by_text("More settings").click()
    page.locator("#steps").fill("11")
    page.get_by_role("button", name="Make video").click()
    tiny_daemon.until(lambda: bool(list(tiny_daemon.outbox.glob("web/the-heron*.mp4"))), "the draft")
    (draft,) = tiny_daemon.outbox.glob("web/the-heron*.mp4")

    def found() -> bool:  # the outbox is looked through every two seconds
        page.goto(f"{web.url}results?draft=1")
        return page.locator(".tile").count() == 1

    tiny_daemon.until(found, "the draft among the results")
    expect(page.locator(".tile .badge")).to_have_text("draft")
    page.locator(".tile a").click()
    page.get_by_role("button", name="Make it final").click()
    expect(page.locator("#toast")).to_contain_text("The draft stays")
    final = draft.with_stem(f"{draft.stem}_final")
    tiny_daemon.until(final.exists, "the final")
    said = json.loads(final.with_suffix(".json").read_text())
    assert (said["steps"], said["draft"]) == (11, False)
    assert said["seed"] == json.loads(draft.with_suffix(".json").read_text())["seed"]

    def named() -> bool:
        page.reload()
        return page.get_by_role("link", name="See its final").count() == 1

    tiny_daemon.until(named, "the final among the results")
    page.get_by_role("link", name="See its final").click()
    expect(page.get_by_role("link", name="See its draft")).to_be_visible()


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


def test_the_lake_on_the_page_is_to_show_what_the_demo_model_does_best() -> None:
    assert actions.PROMPT == demo.PROMPT
    greeting = resources.files(wing).joinpath("templates/hello.html").read_text()
    assert greeting.count(demo.PROMPT) == 2


def test_the_page_loads_no_model_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from framepackd.settings.config import Config\n"
        "from framepackd.web.api import build\n"
        "from framepackd.web import pages\n"
        f"build(Config(state_dir={str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment(), check=True, timeout=120)
