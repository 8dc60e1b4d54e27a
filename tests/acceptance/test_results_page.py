"""The results page of a real daemon, and as a browser shows it; and its metrics."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.acceptance.conftest import Daemon, ending
from tests.daemon.reports.figures import Figures, figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Made:
    """What a daemon has left that has made videos and was stopped, and its metrics before."""

    daemon: Daemon
    figures: Figures  # while it ran
    figures_at_the_end: Figures

    @property
    def outbox(self) -> Path:
        return self.daemon.outbox


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), config='metrics_file = "framepackd.prom"\n')
    metrics = daemon.root / "framepackd.prom"
    daemon.drop("cat", prompt="<b>pan</b> left")
    (daemon.inbox / "trip").mkdir()
    daemon.drop("trip/dog")
    daemon.drop("wrong", steps=0)
    with ending([daemon]):
        daemon.start()
        daemon.until(
            lambda: metrics.exists() and figures(metrics)["jobs", "done"] == 2, "the figures of done jobs"
        )
        while_it_ran = figures(metrics)
        assert daemon.stop() == 0
    assert "metrics_file" not in daemon.log.read_text()
    return Made(daemon, while_it_ran, figures(metrics))


def test_what_a_daemon_made_is_on_its_page_when_it_ends(made: Made) -> None:
    page = (made.outbox / "index.html").read_text()
    assert "2 videos" in page
    assert "1 failed" in page
    assert "steps must be 1 to 100, got 0" in page
    assert "&lt;b&gt;pan&lt;/b&gt; left" in page
    strips = set(re.findall(r"\.framepackd/[0-9a-f-]+\.jpg", page))
    assert len(strips) == 2
    for strip in strips:
        with Image.open(made.outbox / strip) as picture:
            assert picture.format == "JPEG"


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_browser_shows_it_from_the_disk_and_plays_the_videos(made: Made) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        wrong: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((made.outbox / "index.html").as_uri())
        page.wait_for_function("Array.from(document.images).every(image => image.naturalWidth > 0)")
        assert not [url for url in asked if url.endswith(".mp4")], "a video is fetched when it is played"
        for number in range(2):
            video = page.locator("video").nth(number)
            video.evaluate("video => { video.muted = true; return video.play() }")
            page.wait_for_function("n => document.querySelectorAll('video')[n].currentTime > 0", arg=number)
            assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [32, 32]
        assert {url.partition(":")[0] for url in asked} == {"file"}
        assert wrong == []
        browser.close()


def test_a_daemon_that_starts_looks_at_what_has_become_of_its_results(made: Made) -> None:
    (made.outbox / "cat.mp4").unlink()
    assert made.daemon.command("run", "--once").returncode == 0
    assert "1 video," in (made.outbox / "index.html").read_text()


def test_a_daemon_writes_its_metrics_while_it_runs_and_when_it_ends(made: Made) -> None:
    assert made.figures[("up",)] == 1
    assert made.figures[("steps_run_total",)] == 8
    assert made.figures["spent_seconds", "sample"] > 0
    assert made.figures_at_the_end[("up",)] == 0
