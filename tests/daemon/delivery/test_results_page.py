"""The results page: shows what lies in the outbox, leads to it, and harms nobody, whatever texts hold."""

import errno
import json
import logging
import os
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from framepackd import files
from framepackd.delivery import results, results_page
from framepackd.delivery.results import FOLDER, keep_strip
from framepackd.delivery.results_page import ResultsPage
from framepackd.settings.config import Config

FIRST = datetime(2026, 1, 1, tzinfo=UTC)


class Place:
    """An outbox and a failed folder, and the page over them."""

    def __init__(self, root: Path) -> None:
        self.config = Config(
            state_dir=root / "state", inbox=root / "in", outbox=root / "out", failed=root / "no"
        )
        self.outbox, self.failed = self.config.outbox, self.config.failed
        self.outbox.mkdir()
        self.failed.mkdir()
        self.index = self.outbox / "index.html"
        self.made = 0
        self.page = ResultsPage()

    def add(self, path: str, **values: Any) -> str:
        """Deliver a video; gives its id."""
        self.made += 1
        job_id = f"20260101-000000-{self.made:06x}"
        name = Path(path).name
        record = {
            "id": job_id,
            "name": name,
            "state": "done",
            "finished_at": (FIRST + timedelta(minutes=self.made)).isoformat(),
            "width": 640,
            "height": 608,
            "frames": 145,
            "fps": 30,
            "prompt": f"the prompt of {name}",
            "seed": 4711,
            "steps": 25,
            "model": "framepack",
            "device": "cuda:0",
            "quality": None,
            "timings": {"sample": 100.0, "decode": 25.0},
            "inputs": {"image": {"file": f"{name}.png"}, "text": {"file": f"{name}.txt"}},
        }
        (self.outbox / path).parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in (
            (".json", json.dumps(record | values)),
            (".mp4", "video"),
            (".png", "picture"),
        ):
            (self.outbox / f"{path}{suffix}").write_text(content)
        return job_id

    def draw(self) -> "Page":
        assert self.page.update(self.outbox, self.failed) is None
        return Page(self.index)


class Page(HTMLParser):
    """A page as a browser sees it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "poster")]
        if tag in ("h3", "style"):
            self._inside = tag
        if tag == "h3":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside != "style":
            self.text += data
        if self._inside == "h3":
            self.headings[-1] += data

    def targets(self) -> set[Path]:
        """Give the files that the page leads to; each link has to be one to a file beside it."""
        assert not [link for link in self.links if ":" in link or link.startswith("/") or "?" in link]
        return {Path(os.fsdecode(unquote_to_bytes(link))) for link in self.links}

    @property
    def older(self) -> "Page | None":
        own = int(self.path.stem.removeprefix("page-")) if "page-" in self.path.stem else 1000
        numbers = [int(found[1]) for link in self.links if (found := re.search(r"page-(\d+)\.html$", link))]
        older = [number for number in numbers if number < own]
        return Page(self.path.parent / self.links[-1]) if older else None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_page_shows_each_video_with_its_inputs_and_links_them(place: Place) -> None:
    place.add("cat", quality="frozen: nothing moves")
    job_id = place.add("trip/day 1/dog")
    (place.outbox / "trip/day 1/dog.txt").write_text("the prompt of dog")
    (place.outbox / FOLDER).mkdir()
    (place.outbox / FOLDER / f"{job_id}.jpg").write_bytes(b"strip")
    page = place.draw()
    assert page.headings == ["trip/day 1/dog", "cat"], "the newest first"
    for said in (
        "the prompt of dog",
        "640×608 · 4.8 s · seed 4711 · framepack · 25 steps · made in 2 min 5 s on cuda:0",
        "suspect frozen: nothing moves",
        "2 videos",
    ):
        assert said in page.text
    dog = {Path("trip/day 1") / f"dog{suffix}" for suffix in (".mp4", ".json", ".png", ".txt")}
    cat = {Path(f"cat{suffix}") for suffix in (".mp4", ".json", ".png")}
    assert page.targets() == dog | cat | {Path(FOLDER, f"{job_id}.jpg")}, "and to nothing that is not there"


# Whatever Linux allows, bytes that are not UTF-8 as well.
NAMES = st.binary(min_size=1, max_size=60).map(lambda name: os.fsdecode(name.translate(None, b"/\0")))


@given(name=NAMES, prompt=st.text(max_size=60), quality=st.text(max_size=20))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_and_texts_are_shown_and_do_nothing(
    tmp_path_factory: pytest.TempPathFactory, name: str, prompt: str, quality: str
) -> None:
    place = Place(tmp_path_factory.mktemp("place"))
    place.add("plain")
    place.add("folder/plain")
    plain = place.draw()
    name = name.lstrip(".") or "x"
    texts = {"prompt": prompt, "model": prompt, "quality": quality or None, "device": quality or None}
    place.add(f"sub/{name}", name="plain", inputs={}, **texts)
    page = place.draw()
    assert page.tags - {"h3", "p", "b"} == plain.tags - {"h3", "p", "b"}, "no element more"
    assert page.attributes - {"dir", "tabindex"} == plain.attributes - {"dir", "tabindex"}
    assert page.targets() == plain.targets() | {Path("sub", f"{name}.mp4"), Path("sub", f"{name}.json")}
    assert len(page.headings) == 3


def test_videos_are_shown_by_day_and_can_be_chosen_by_folder_without_a_script(place: Place) -> None:
    noon = datetime(2026, 1, 1, 12).astimezone()  # here, as the page's days are
    for number, name in enumerate(("cat", "sea/wave", "sea/gull")):
        place.add(name, finished_at=(noon + timedelta(days=number // 2)).isoformat())
    page = place.draw()
    text = place.index.read_text()
    assert re.findall(r'class="day">([^<]*)<span>([^<]*)<', text) == [
        ("Friday, 2 January 2026", "1 video"),
        ("Thursday, 1 January 2026", "2 videos"),
    ]
    assert re.findall(r'id="folder-\d">([^<]*)<', text) == ["no folder", "sea"]
    assert re.findall(r'article data-folder="(\d)"', text) == ["2", "2", "1"]
    assert {"loop", "muted", "playsinline"} <= page.attributes
    (place.outbox / "cat.mp4").unlink()
    assert "radiogroup" not in place.draw().path.read_text(), "there is nothing to choose"


def test_a_jobs_warnings_are_shown(place: Place) -> None:
    place.add("cat", warnings=["prompt is cut: …", "LoRA <b>: 2 of its keys belong nowhere"])
    assert "prompt is cut: …" in place.draw().text
    assert "LoRA <b>: 2 of its keys" in place.draw().text


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", '" onerror="alert(1)', "javascript:alert(1)", "{{ 7 * 7 }}", "a\u202eb"],
)
def test_markup_in_texts_is_shown_and_not_run(place: Place, text: str) -> None:
    place.add("cat", prompt=text, device=text, quality=text, warnings=[text])
    (place.failed / f"{text.replace('/', '')}.error.txt").write_text(f"{text}: put it right\n\nmore\n")
    page = place.draw()
    assert "script" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.text.count(text.replace("\u202e", "\\u202e")) >= 4


@pytest.mark.parametrize("count", range(8))
def test_each_video_is_on_one_page_and_full_pages_stay_as_they_are(
    place: Place, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(results_page, "PAGE_RESULTS", 2)
    names = [f"n{number}" for number in range(count)]
    for name in names:
        place.add(name)
    place.add("last")
    shown: list[str] = []
    page: Page | None = place.draw()
    while page is not None:
        shown += page.headings
        assert all(
            (page.path.parent / target).exists() for target in page.targets() if target.suffix != ".txt"
        )
        page = page.older
    assert shown == ["last", *reversed(names)]
    before = {path: path.stat().st_ino for path in (place.outbox / FOLDER).glob("page-*.html")}
    place.add("another")
    place.draw()
    after = {path: path.stat().st_ino for path in before}
    changed = [path for path in before if before[path] != after[path]]
    assert len(changed) <= 1, "the last of them may now lead to a newer one"


def test_fewer_videos_have_fewer_pages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "PAGE_RESULTS", 2)
    for number in range(8):
        place.add(f"n{number}")
    place.draw()
    for path in place.outbox.glob("n[2-7].mp4"):
        path.unlink()
    assert place.draw().headings == ["n1", "n0"]
    assert not list((place.outbox / FOLDER).glob("page-*.html"))


def test_results_that_people_move_or_remove_move_or_vanish(place: Place) -> None:
    for name in ("cat", "dog", "owl"):
        place.add(name)
    place.draw()
    (place.outbox / "best").mkdir()
    for path in place.outbox.glob("cat.*"):
        path.rename(place.outbox / "best" / path.name)
    (place.outbox / "dog.mp4").unlink()
    page = place.draw()
    assert page.headings == ["owl", "best/cat"]
    assert Path("best/cat.mp4") in page.targets()
    for path in place.outbox.rglob("*.mp4"):
        path.unlink()
    assert "0 videos" in place.draw().text


def test_a_record_that_changes_is_read_again(place: Place) -> None:
    place.add("cat")
    place.draw()
    record = json.loads((place.outbox / "cat.json").read_text())
    (place.outbox / "cat.json").write_text(json.dumps(record | {"prompt": "another prompt altogether"}))
    assert "another prompt altogether" in place.draw().text


def test_failed_jobs_are_listed_with_their_reasons_until_they_run_again(place: Place) -> None:
    place.add("cat")
    for number in range(25):
        path = place.failed / "deep" / f"n{number:02}.error.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"steps must be 1 to 100, got {number + 1000}\n\nIts files lie beside this one.\n")
        os.utime(path, (number, number))
    page = place.draw()
    assert "25 failed" in page.text
    assert "deep/n24 steps must be 1 to 100, got 1024" in page.text
    assert "Its files lie" not in page.text
    assert "got 1004" not in page.text
    assert "and 5 more" in page.text
    for path in (place.failed / "deep").iterdir():
        path.unlink()
    assert "failed" not in place.draw().text


def test_there_is_no_page_before_there_is_something_to_show(place: Place) -> None:
    assert place.page.update(place.outbox, place.failed) is None
    assert not list(place.outbox.iterdir())


@pytest.mark.parametrize("theirs", ["a file", "a link", "a folder", "a link to nowhere"])
def test_an_index_that_somebody_else_made_is_left_alone(place: Place, tmp_path: Path, theirs: str) -> None:
    place.add("cat")
    target = tmp_path / "mine.html"
    if theirs == "a file":
        place.index.write_text("<h1>my page</h1>")
    elif theirs == "a folder":
        place.index.mkdir()
    else:
        place.index.symlink_to(target)
    if theirs == "a link":
        target.write_text(f"<!doctype html>\n{results_page.MARK}\n")
    before = place.index.lstat()
    trouble = place.page.update(place.outbox, place.failed)
    assert trouble is not None
    assert "move it away" in trouble
    assert place.index.lstat() == before
    assert not (place.outbox / FOLDER).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"id": "../../../etc/passwd", "name": "x"}',
        b'{"id": "20260101-000000-abcdef", "name": "x", "width": 0}',
        b"[" * 100_000,
        b'"' + b"x" * results.MAX_RECORD_BYTES + b'"',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_json_file_that_is_no_record_is_no_result(place: Place, content: bytes) -> None:
    place.add("cat")
    (place.outbox / "x.mp4").write_text("video")
    (place.outbox / "x.json").write_bytes(content)
    assert place.draw().headings == ["cat"]


@pytest.mark.parametrize(
    "values",
    [
        {"id": "../../secret"},
        {"id": "20260101-000000-abcdef\n"},
        {"width": 0},
        {"width": -5},
        {"fps": 0},
        {"width": '1;background:url("http://x")'},
        {"finished_at": "yesterday"},
        {"timings": {"a": "b"}},
    ],
    ids=str,
)
def test_an_impossible_record_is_no_result(place: Place, values: dict[str, Any]) -> None:
    place.add("cat", **values)
    place.add("dog")
    assert place.draw().headings == ["dog"]


@pytest.mark.parametrize(
    "inputs", [{"a": 5}, {"a": {"file": 7}}, {"a": {"file": "../../x"}}, {"a": [None]}], ids=str
)
def test_inputs_that_are_not_there_are_not_linked(place: Place, inputs: dict[str, Any]) -> None:
    place.add("cat", inputs=inputs)
    assert place.draw().targets() == {Path("cat.mp4"), Path("cat.json")}


def test_the_frames_of_a_chain_are_linked_each(place: Place) -> None:
    for number in range(3):
        (place.outbox / f"cat_frame_{number}.png").write_text("picture")
    place.add("cat", inputs={"frames": [{"file": f"cat_frame_{number}.png"} for number in range(3)]})
    assert {Path(f"cat_frame_{number}.png") for number in range(3)} <= place.draw().targets()


def test_links_pipes_and_hidden_folders_are_not_looked_into(place: Place, tmp_path: Path) -> None:
    place.add("cat")
    elsewhere = Place(make(tmp_path / "elsewhere"))
    elsewhere.add("secret")
    (place.outbox / "link").symlink_to(elsewhere.outbox)
    (place.outbox / "s.json").symlink_to(elsewhere.outbox / "secret.json")
    (place.outbox / "s.mp4").write_text("video")
    os.mkfifo(place.outbox / "p.json")
    (place.outbox / "p.mp4").write_text("video")
    (place.failed / "x.error.txt").symlink_to(elsewhere.outbox / "secret.json")
    place.add(".trash/old")
    page = place.draw()
    assert page.headings == ["cat"]
    assert "failed" not in page.text


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_filmstrips_of_removed_videos_are_removed_after_a_day_and_nothing_else_is(place: Place) -> None:
    kept, gone = place.add("cat"), place.add("dog")
    folder = place.outbox / FOLDER
    strip = place.failed / "strip.jpg"
    Image.new("RGB", (50, 10)).save(strip)
    for job_id in (kept, gone):
        keep_strip(strip, place.outbox, job_id)
    (folder / "holiday.jpg").write_text("somebody's")
    (place.outbox / "dog.mp4").unlink()
    place.draw()
    assert (folder / f"{gone}.jpg").exists(), "its video may be on its way"
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    place.draw()
    assert {path.name for path in folder.iterdir()} == {f"{kept}.jpg", "holiday.jpg"}


def test_things_that_only_have_the_name_of_a_page_or_filmstrip_are_left_alone(place: Place) -> None:
    place.add("cat")
    folder = place.outbox / FOLDER
    names = ("20250101-000000-aaaaaa.jpg", "page-7.html", "page-08.html", "page-9.html")
    for name in names[:2]:
        (folder / name).mkdir(parents=True)
    for name in names[2:]:
        (folder / name).write_text("somebody's")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    place.draw()
    assert {path.name for path in folder.iterdir()} == {*names}


def test_pictures_are_not_removed_through_a_link(place: Place, tmp_path: Path) -> None:
    """There they may be those of another outbox."""
    place.add("cat")
    strip = make(tmp_path / "elsewhere") / "20250101-000000-aaaaaa.jpg"
    strip.touch()
    os.utime(strip, (0, 0))
    (place.outbox / FOLDER).symlink_to(strip.parent)
    place.draw()
    assert strip.exists()


def test_videos_in_recycle_bins_are_no_results(place: Place) -> None:
    for folder in ("#recycle", "@Recycle", "$RECYCLE.BIN", "#snapshot/2026"):
        place.add(f"{folder}/gone")
    place.add("cat")
    assert place.draw().headings == ["cat"]


def test_a_page_that_cannot_be_written_is_logged_once_and_written_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place.add("cat")
    write_bytes, tries = Path.write_bytes, []
    tried = threading.Semaphore(0)

    def full(self: Path, content: bytes) -> int:
        tries.append(self)
        write_bytes(self, content[:10])
        tried.release()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(results_page, "PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "write_bytes", full)
        for _ in range(3):
            place.page.refresh(place.config)
            assert tried.acquire(timeout=20)
        place.page.close()
    assert len(tries) == 3
    assert caplog.text.count("the results page cannot be written") == 1
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert not [path.name for path in place.outbox.iterdir() if "index" in path.name], "nor a part of one"
    place.draw()


def test_nobody_waits_for_a_folder_that_hangs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, released = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hanging.set()
        released.wait(60)

    monkeypatch.setattr(results_page, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(results_page, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(place.page, "update", hang)
    begun = time.monotonic()
    place.page.refresh(place.config)
    assert hanging.wait(20)
    place.page.refresh(place.config)
    place.page.close()
    assert time.monotonic() - begun < 20
    released.set()


def test_a_burst_of_results_has_one_page(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write_bytes = files.write_bytes

    def counting(path: Path, content: bytes, **named: bool) -> None:
        written.append(path.name)
        write_bytes(path, content, **named)

    monkeypatch.setattr(files, "write_bytes", counting)
    monkeypatch.setattr(results_page, "PAUSE_SECONDS", 60.0)
    for number in range(30):
        place.add(f"n{number}")
        place.page.refresh(place.config)
    place.page.close()
    assert written == ["index.html"], "at once, when the daemon ends"
    assert len(Page(place.index).headings) == 30


def test_without_the_setting_there_is_no_page(place: Place) -> None:
    place.add("cat")
    place.page.refresh(place.config.model_copy(update={"results_page": False}))
    place.page.close()
    assert not place.index.exists()


def test_an_unchanged_page_is_not_written_again(place: Place) -> None:
    place.add("cat")
    place.draw()
    before = place.index.stat()
    place.draw()
    assert place.index.stat() == before or place.index.stat().st_mtime_ns == before.st_mtime_ns


def test_a_video_does_without_a_picture_that_cannot_be_kept(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strip = tmp_path / "strip.jpg"
    strip.write_bytes(b"strip")
    (place.outbox / FOLDER).write_text("in the way")
    keep_strip(strip, place.outbox, place.add("cat"))
    assert "the results page has no picture of it" in caplog.text
    assert place.draw().headings == ["cat"]
