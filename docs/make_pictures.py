"""Take the README's pictures from a real run: status in the middle of its work, both pages.

    python docs/make_pictures.py

Nothing is posed: a daemon with the demo model, jobs dropped into its inbox, what status prints, what
comes out.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Error, Page, sync_playwright
from rich.console import Console

from framepackd.cli import display
from framepackd.control import socket

PORT = 7877
PICTURES = Path(__file__).parent / "pictures"
DEMO = Path(str(files("framepackd").joinpath("demo")))
JOBS = {  # name: prompt, settings
    "evening": ("The sun sets over the lake.", ""),
    "closer": ("The camera zooms in.", ""),
    "trip/lake": ("The camera pans to the right.", "steps = 25\nseconds = 5\n"),
    "trip/fog": ("Fog rises from the water.", ""),
    "fox": ("The fox looks up.", "steps = 0\n"),
}


# Where this machine keeps things is nobody's concern.
HIDE_PLACE = """place => document.querySelectorAll("code").forEach(
    code => { code.textContent = code.textContent.replace(place, "~/.local/state/framepackd"); })"""


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = os.environ | {
            "FRAMEPACKD_STATE_DIR": str(root / "state"),
            "FRAMEPACKD_MODEL": "demo",
            "FRAMEPACKD_SETTLE_SECONDS": "0.5",
            "FRAMEPACKD_DEFAULTS__SECONDS": "2.4",
            "FRAMEPACKD_DEFAULTS__STEPS": "8",
        }
        (root / "state/inbox").mkdir(parents=True)
        command = [sys.executable, "-m", "framepackd"]
        daemon = subprocess.Popen([*command, "run"], env=environment)  # noqa: S603 - our own command
        serving = [*command, "web", "--port", str(PORT)]
        web = subprocess.Popen(serving, env=environment)  # noqa: S603 - our own command
        try:
            draw_web(root / "state")
            wait_until(root / "state", name="lake", section=2)
            draw_status(root / "state")
            wait_until(root / "state", name="lake", section=None)
            wait_until(root / "state", name="fog", section=None)
            draw_results(root / "state")
        finally:
            for process in (web, daemon):
                process.send_signal(signal.SIGTERM)
                process.wait()
        with browser_tab(720) as tab:
            tab.goto((root / "state/outbox/index.html").as_uri())
            take(tab, "results-page")


def drop(inbox: Path) -> None:
    lake = Image.open(DEMO / "lake.png")
    for number, (name, (prompt, settings)) in enumerate(JOBS.items()):
        (inbox / name).parent.mkdir(exist_ok=True)
        left, top = 12 * number % 40, 9 * number % 40
        lake.crop((left, top, lake.width - 40 + left, lake.height - 40 + top)).save(inbox / f"{name}.png")
        (inbox / f"{name}.txt").write_text(prompt)
        if settings:
            (inbox / f"{name}.toml").write_text(settings)
        time.sleep(0.1)
    shutil.copy(DEMO / "lake.png", inbox / "owl.png")


def wait_until(state: Path, *, name: str, section: int | None) -> None:
    """Wait until a job is in a section, or, with None, done."""
    while True:
        time.sleep(0.3)
        try:
            jobs = socket.ask(state, {"command": "status"})["jobs"]
        except OSError:
            continue
        job = next((job for job in jobs if job["name"] == name), None)
        if job and (
            job["state"] == "done" if section is None else job["section"] == section and job["step"] > 9
        ):
            return


def draw_status(state: Path) -> None:
    report = socket.ask(state, {"command": "status"})
    for job in report["jobs"]:  # where this machine keeps things is nobody's concern
        job["output"] = job["output"] and job["output"].replace(str(state), "~/.local/state/framepackd")
    console = Console(record=True, width=118, highlight=False, force_terminal=True)
    console.print("[bold]$ framepackd status[/]")
    console.print(display.status(report))
    console.save_svg(str(PICTURES / "status.svg"), title="framepackd status")


def draw_web(state: Path) -> None:
    """Use framepackd web as a person would."""
    with browser_tab(760) as tab:
        while True:
            try:
                tab.goto(f"http://localhost:{PORT}/")
                break
            except Error:  # it is just starting
                time.sleep(1)
        tab.evaluate(HIDE_PLACE, str(state))
        take(tab, "page-rest", settled=1000)
        tab.goto(f"http://localhost:{PORT}/make")
        tab.locator("#pictures").set_input_files(DEMO / "lake.png")
        tab.get_by_label("What happens?").fill("Night falls over the lake.")
        take(tab, "page-make", settled=1000)
        tab.get_by_role("button", name="Make video").click()
        tab.get_by_text("in the queue in").wait_for()
        drop(state / "inbox")
        tab.goto(f"http://localhost:{PORT}/")
        tab.locator(".stage", has_text=re.compile("Section 2/")).wait_for(timeout=600_000)
        take(tab, "page-running")
    with browser_tab(760, scheme="dark") as tab:
        tab.goto(f"http://localhost:{PORT}/")
        tab.locator("#needs").wait_for()
        take(tab, "page-running-dark")


def draw_results(state: Path) -> None:
    with browser_tab(700) as tab:
        tab.goto(f"http://localhost:{PORT}/results")
        tab.evaluate(HIDE_PLACE, str(state))
        take(tab, "page-results")


@contextmanager
def browser_tab(height: int, scheme: Literal["light", "dark"] = "light") -> Iterator[Page]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1200, "height": height}, color_scheme=scheme)
        browser.close()


def take(tab: Page, name: str, *, whole: bool = False, settled: float = 4000) -> None:
    """Take a picture of a page; pages take a moment (milliseconds) to hide what they show while they load."""
    tab.wait_for_timeout(settled)
    with Image.open(io.BytesIO(tab.screenshot(full_page=whole))) as picture:
        small = picture.convert("RGB").quantize(160, dither=Image.Dither.NONE)
        small.save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
