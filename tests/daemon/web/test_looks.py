"""How the page looks: on phones and wide screens, by day and by night, with a full queue and many results."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sqlalchemy.orm import Session

from framepackd.control import client
from framepackd.jobs.database import open_database
from framepackd.jobs.job import Job, State, utc_now
from framepackd.settings.config import load_config
from framepackd.web.media import OUTBOX
from tests.acceptance.conftest import Daemon, picture
from tests.crash.harness import stretched
from tests.daemon.web.conftest import CHROMIUM, Web, in_a_browser, running, tiny_daemon_in
from tests.daemon.web.results import finished

PATIENCE = 60_000  # ms
RESULTS = 60


class Place:
    """A paused daemon with twelve jobs, two failures, three that wait, and sixty results; and its page."""

    def __init__(self, daemon: Daemon, web: Web, ids: list[str]) -> None:
        self.daemon, self.web, self.ids = daemon, web, ids


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    expect.set_options(timeout=PATIENCE)
    with tiny_daemon_in(tmp_path_factory.mktemp("looks")) as daemon, running(daemon) as web:
        assert daemon.command("pause").returncode == 0
        for number in range(12):
            daemon.drop(
                f"queued-{number}", prompt="The otter lifts its head and sniffs the wind. " * (number % 3 + 1)
            )
        for name in ("bad-1", "bad-2"):
            daemon.drop(name, steps=101)
        picture(daemon.inbox / "wren.png")
        (daemon.inbox / "lonely.txt").write_text("The moon rises.")
        picture(daemon.inbox / "cup.png")
        picture(daemon.inbox / "cup.jpg")
        (
            daemon.inbox / "a-name-without-any-end-or-place-to-break-it-that-is-longer-than-a-phone.txt"
        ).write_text("x")
        ids = finished(daemon.outbox, RESULTS)
        daemon.until(
            lambda: (
                (daemon.status()["counts"] | {}).get("queued") == 12
                and daemon.status()["counts"]["failed"] == 2
            ),
            "the queue",
        )
        yield Place(daemon, web, ids)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def paths(place: Place) -> list[str]:
    return ["", "make", "results", f"results/{place.ids[3]}", "results/20000101-000000-000000", "page/login"]


PAINTED = """() => new Promise(done => new PerformanceObserver(
    seen => done(seen.getEntries()[0].startTime)).observe({type: "paint", buffered: true}))"""


def first_paint(page: Page, url: str) -> float:
    """Give the seconds until something is to be seen."""
    page.goto(url)
    return float(page.evaluate(PAINTED)) / 1000


@in_a_browser
@pytest.mark.parametrize("path", ["", "make", "results"])
def test_something_is_to_be_seen_within_a_third_of_a_second(
    browser: Browser, place: Place, path: str
) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    assert min(first_paint(page, place.web.url + path) for _ in range(3)) < stretched(0.3)
    page.close()


@in_a_browser
@pytest.mark.parametrize(
    "width",
    [360, pytest.param(390, marks=pytest.mark.long), pytest.param(1440, marks=pytest.mark.long), 2560],
)
def test_nothing_has_to_be_scrolled_sideways(browser: Browser, place: Place, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    for path in paths(place):
        page.goto(place.web.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.close()


@in_a_browser
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1440, "light"),
        pytest.param(390, "light", marks=pytest.mark.long),
        pytest.param(1440, "dark", marks=pytest.mark.long),
    ],
)
def test_a_screen_reader_finds_nothing_serious(
    browser: Browser, place: Place, width: int, scheme: Any
) -> None:
    page = browser.new_page(
        viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    for path in paths(place):
        page.goto(place.web.url + path)
        found = Axe().run(page).response
        serious = [
            (
                each["id"],
                each["help"],
                [node["html"][:120] + str(node["any"][:1]) for node in each["nodes"][:3]],
            )
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, f"{path}: {serious}"
    assert not errors
    page.close()


@in_a_browser
def test_the_night_line_is_one_stop_and_leads_to_the_cards(browser: Browser, place: Place) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(place.web.url)
    expect(page.locator("#line .seg")).to_have_count(12)
    assert page.locator('#line .seg a:not([tabindex="-1"])').count() == 1
    page.locator("#line .seg a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    third = page.locator("#line .seg").nth(2).get_attribute("data-id")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == f"grip-{third}"
    page.close()


@in_a_browser
def test_results_are_searched_filtered_and_played(browser: Browser, place: Place) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{place.web.url}results")
    expect(page.locator(".tile")).to_have_count(RESULTS)
    page.locator(".tile").first.hover()
    expect(page.locator(".tile.playing")).to_have_count(1)
    page.keyboard.press("/")
    page.keyboard.type("wave 11")
    expect(page.locator(".tile")).to_have_count(1)
    page.locator("#find").fill("")
    page.get_by_label("Folder").select_option("sea")
    expect(page.locator(".tile")).to_have_count(RESULTS // 2)
    page.get_by_label("Looks odd").check()
    expect(page.locator(".tile")).to_have_count(3)
    page.goto(f"{place.web.url}results/{place.ids[1]}")
    page.keyboard.press("ArrowRight")
    expect(page).to_have_url(re.compile(place.ids[2]))
    page.close()


@in_a_browser
def test_a_result_is_made_again_used_and_moved_to_the_trash(browser: Browser, place: Place) -> None:
    page = browser.new_page()
    page.goto(f"{place.web.url}results/{place.ids[0]}")
    page.get_by_role("button", name="Again, another seed").click()
    expect(page.locator("#toast")).to_contain_text("with seed")
    place.daemon.until(lambda: place.daemon.status()["counts"]["queued"] == 13, "the job")
    page.get_by_role("link", name="Use these settings").click()
    expect(page.get_by_label("What happens?")).to_have_value("The otter moves, number 0.")
    page.get_by_role("button", name="Make video").click()
    place.daemon.until(lambda: place.daemon.status()["counts"]["queued"] == 14, "the job")
    alike = [job for job in place.daemon.status()["jobs"] if job["prompt"] == "The otter moves, number 0."]
    record = json.loads((place.daemon.outbox / "made-000.json").read_text())
    assert {(job["width"], job["height"]) for job in alike} == {(record["width"], record["height"])}
    page.goto(f"{place.web.url}results/{place.ids[4]}")
    page.get_by_role("button", name="Move to trash").click()
    expect(page.locator("#toast")).to_contain_text("Nothing is deleted")
    trash = place.daemon.outbox.with_name("outbox-trash")
    assert {path.name for path in trash.rglob("made-004*")} >= {
        f"made-004.{end}" for end in ("mp4", "json", "png", "txt")
    }
    assert not list(place.daemon.outbox.glob("made-004*"))
    page.close()


def test_one_of_two_pictures_of_one_name_is_taken_and_the_other_is_kept(place: Place) -> None:
    page = httpx.get(place.web.url)
    token = re.findall(r'name="token" value="([^"]+)"', page.text)[0]
    assert 'aria-label="Take cup.png"' in page.text
    form = {"token": token, "folder": "", "name": "cup", "file": "cup.png"}
    for wrong in ({"file": "wren.png"}, {"name": "wren"}, {"folder": ".."}):
        httpx.post(f"{place.web.url}page/do/choose", data=form | wrong)
        assert (place.daemon.inbox / "cup.jpg").exists()
    assert httpx.post(f"{place.web.url}page/do/choose", data=form).status_code == 303
    kept = place.daemon.outbox.with_name("outbox-trash") / "cup/cup.jpg"
    assert kept.exists()
    assert (place.daemon.inbox / "cup.png").exists()
    place.daemon.until(
        lambda: (
            ("cup", "no_prompt")
            in [(each["name"], each["reason"]) for each in place.daemon.status()["waiting"]]
        ),
        "the picture to wait for its sentence",
    )


@in_a_browser
def test_pictures_become_a_chain_in_the_order_that_they_are_put_in(
    browser: Browser, place: Place, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{place.web.url}make")
    files = [picture(tmp_path / f"photo-{number}.png", number) for number in range(3)]
    page.locator("#pictures").set_input_files(files)
    expect(page.get_by_role("button", name="Make 3 videos")).to_be_visible()
    page.get_by_role("radio", name="One chain").check()
    expect(page.locator("#length")).to_have_text("1.6 s, 4 sections")
    page.get_by_role("button", name="Move photo-0.png, place 1 of 3").focus()
    for key in ("Space", "ArrowDown", "Space"):
        page.keyboard.press(key)
    page.get_by_label("What happens?").fill("one place becomes another")
    page.get_by_label("Model").select_option("demo-f1")
    page.locator("#go").click()
    expect(page.locator("#err-model")).to_contain_text("framepack")
    page.get_by_label("Model").select_option("tiny")
    page.locator("#go").click()
    expect(page.locator("#toast")).to_contain_text("in the inbox")

    jobs = place.daemon.status
    place.daemon.until(lambda: any("one-place" in job["name"] for job in jobs()["jobs"]), "the chain")
    (name,) = [job["id"] for job in jobs()["jobs"] if "one-place" in job["name"]]
    shown = client.ask(load_config(place.daemon.config), {"command": "show", "job": name})
    assert shown is not None
    found = [shown["job"]["inputs"][f"frame-{number}"]["sha256"] for number in range(3)]
    assert found == [hashlib.sha256(files[number].read_bytes()).hexdigest() for number in (1, 0, 2)]
    assert shown["job"]["clips"] == 2
    page.close()


@in_a_browser
def test_two_thousand_results_and_five_hundred_in_the_queue_are_shown_in_parts_and_as_quickly(
    browser: Browser, tmp_path: Path
) -> None:
    daemon = Daemon(tmp_path)
    daemon.state.mkdir()
    known = {"folder": "", "state": State.QUEUED, "created_at": utc_now(), "frames": 25}
    empty: dict[str, Any] = {"inputs": {}, "settings": {}, "history": []}
    with Session(open_database(load_config(daemon.config).database)) as session, session.begin():
        for number in range(500):
            names = {"id": f"20260101-000000-{number:06x}", "name": f"cat-{number}"}
            session.add(Job(position=number, **names, **known, **empty))
    finished(daemon.outbox, 2000)
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    with running(daemon) as web:
        for path in ("", "results", "results?q=number+1999"):
            assert min(first_paint(page, web.url + path) for _ in range(3)) < stretched(1), path
        expect(page.locator(".tile")).to_have_count(1)
        page.goto(web.url)
        expect(page.locator(".job")).to_have_count(60)
        expect(page.locator("#queue")).to_contain_text("and 440 more behind them")
        page.goto(f"{web.url}results")
        expect(page.locator(".tile")).to_have_count(60)
    page.close()


def test_parts_of_a_video_are_served_and_nothing_beside_it(place: Place) -> None:
    url = f"{place.web.url}results/{place.ids[2]}"
    part = httpx.get(f"{url}/video.mp4", headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["x-content-type-options"] == "nosniff"
    for file in ("..%2f..%2fconfig.toml", "made-001.mp4", "%2e%2e", "made-002.json.x"):
        assert httpx.get(f"{url}/{file}").status_code == 404, file
    for job in ("..", "%2e%2e%2f", place.ids[2][:-1] + "g"):
        assert httpx.get(f"{place.web.url}page/jobs/{job}/video.live").status_code == 404
    wanted = {"folder": "..", "file": "config.toml"}
    assert httpx.get(f"{place.web.url}page/waiting", params=wanted).status_code == 404


def test_the_page_in_the_outbox_is_linked_and_shows_its_videos_under_a_policy_of_its_own(
    place: Place,
) -> None:
    assert 'href="/outbox/index.html"' in httpx.get(f"{place.web.url}results").text
    page = httpx.get(f"{place.web.url}outbox/index.html")
    assert page.headers.get_list("content-security-policy") == [OUTBOX]
    links = set(re.findall(r'(?:href|src|poster)="([^"#]+)"', page.text))
    assert len(links) > RESULTS
    for link in sorted(links)[:: len(links) // 10]:
        assert httpx.get(f"{place.web.url}outbox/{link}").status_code == 200, link
    (place.daemon.outbox / "diary.txt").write_text("of nobody's job")
    for other in ("diary.txt", "../config.toml", "%2e%2e/config.toml", ".framepackd/page-9.html"):
        assert httpx.get(f"{place.web.url}outbox/{other}").status_code == 404, other


def test_a_form_without_the_token_of_this_page_changes_nothing(place: Place) -> None:
    for path in ("page/do/resume", "make/upload", "make/estimate", "page/missing/upload"):
        for token in ("", "guessed"):
            answer = httpx.post(place.web.url + path, data={"token": token})
            assert answer.status_code in (303, 403), path
    for path in ("page/do/resume", "make/upload"):
        broken = {"content-type": "multipart/form-data; boundary=x"}
        assert httpx.post(place.web.url + path, content=b"--y", headers=broken).status_code in (303, 400, 403)
    assert httpx.post(f"{place.web.url}page/do/pause", files={"x": b"x"}).status_code == 400
    assert httpx.get(f"{place.web.url}page/do/pause").status_code == 405
    assert place.daemon.status()["daemon"]["paused"]


def test_no_page_lets_scripts_or_files_of_others_in(place: Place) -> None:
    for path in paths(place):
        answer = httpx.get(place.web.url + path, headers={"accept": "text/html"})
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "unsafe-eval" not in policy
        assert not re.findall(r"""(?:src|href|action)="(?:https?:)?//""", answer.text)
        assert not re.findall(r"<script(?![^>]*src=)|\son[a-z]+=", answer.text)
