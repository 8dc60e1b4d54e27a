"""Which files become a job, which wait, and why; on real folders, with a clock that is told the time."""

import contextlib
import errno
import os
import re
import tempfile
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framepackd.files import folder_below
from framepackd.inbox import listing
from framepackd.inbox import scan as inbox
from framepackd.inbox.naming import group_files
from framepackd.inbox.scan import Inbox, Name, Scan

SETTLE = 5.0


class Box:
    """An inbox and its clock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.time = 100.0
        self.inbox = Inbox(root, SETTLE, now=lambda: self.time)

    def put(self, *names: str, content: str = "x") -> None:
        for name in names:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(content)

    def settled(self) -> Scan:
        self.inbox.scan()
        self.time += SETTLE
        return self.inbox.scan()

    def roles(self) -> list[dict[str, list[str]]]:
        return [dict(group.files) for group in self.settled().ready]

    def waiting(self) -> dict[str, str]:
        return {entry.name: entry.missing for entry in self.settled().waiting}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_file_still_growing_is_left_alone(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    for size in range(2, 6):
        scan = box.inbox.scan()
        assert not scan.ready
        assert scan.unsettled
        box.time += SETTLE - 1
        box.put("cat.png", content="x" * size)
    box.inbox.scan()
    box.time += SETTLE
    assert [group.name for group in box.inbox.scan().ready] == ["cat"]


def test_a_file_of_the_same_size_and_time_under_another_inode_has_changed(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    box.inbox.scan()
    box.time += SETTLE - 1
    before = (box.root / "cat.png").stat()
    box.put("new")
    os.utime(box.root / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (box.root / "new").rename(box.root / "cat.png")
    box.inbox.scan()
    box.time += 1
    assert not box.inbox.scan().ready


def test_times_in_the_past_or_the_future_make_no_difference(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    os.utime(box.root / "cat.png", (0, 0))
    os.utime(box.root / "cat.txt", (2**33, 2**33))
    assert not box.inbox.scan().ready
    assert len(box.settled().ready) == 1


def test_the_whole_group_waits_for_its_slowest_file(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    box.inbox.scan()
    box.time += SETTLE - 1
    box.put("cat_end.png")
    box.inbox.scan()
    box.time += 1
    assert not box.inbox.scan().ready
    box.time += SETTLE
    assert set(box.inbox.scan().ready[0].files) == {"image", "text", "end"}


def test_defaults_that_still_change_hold_back_the_jobs_below(box: Box) -> None:
    box.put("a/cat.png", "a/cat.txt")
    box.inbox.scan()
    box.time += SETTLE - 1
    box.put("_defaults.toml", content="steps = 3")
    box.inbox.scan()
    box.time += 1
    assert not box.inbox.scan().ready


@pytest.mark.parametrize(
    ("files", "roles"),
    [
        (["cat.png", "cat.txt"], {"image": ["cat.png"], "text": ["cat.txt"]}),
        (["cat.JPEG", "cat.TXT"], {"image": ["cat.JPEG"], "text": ["cat.TXT"]}),
        (["c.webp", "c.txt", "c.end.png"], {"image": ["c.webp"], "text": ["c.txt"], "end": ["c.end.png"]}),
        (["c.bmp", "c.txt", "c_end.jpg"], {"image": ["c.bmp"], "text": ["c.txt"], "end": ["c_end.jpg"]}),
        (
            ["c_first_frame.png", "c_last_frame.png", "c.txt", "c_frame_diff.txt", "c.toml"],
            {
                "image": ["c_first_frame.png"],
                "end": ["c_last_frame.png"],
                "text": ["c.txt"],
                "diff": ["c_frame_diff.txt"],
                "settings": ["c.toml"],
            },
        ),
    ],
)
def test_names_decide_what_a_file_is(box: Box, files: list[str], roles: dict[str, list[str]]) -> None:
    box.put(*files, content="steps = 3")
    assert box.roles() == [roles]


def test_frames_of_a_chain_are_ordered_by_number(box: Box) -> None:
    frames = [f"cat_frame_{number}.png" for number in range(11)]
    box.put("cat.txt", *reversed(frames))
    (group,) = box.settled().ready
    assert group.paths == [*frames, "cat.txt"], "10 comes after 9"
    assert [group.only(role) for role in group.frames] == frames


def test_one_frame_with_a_text_of_its_own_is_a_picture_and_no_chain(box: Box) -> None:
    box.put("cat_frame_0.png", "cat_frame_0.txt")
    assert [(group.name, group.frames) for group in box.settled().ready] == [("cat_frame_0", [])]


@settings(deadline=None)  # it writes files
@given(numbers=st.sets(st.integers(0, 8), min_size=1))
def test_a_chain_is_taken_only_without_a_gap(numbers: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        box = Box(Path(folder))
        box.put("cat.txt", *(f"cat_frame_{number}.png" for number in numbers))
        waiting = box.waiting()
    whole = numbers == set(range(len(numbers))) and len(numbers) > 1
    assert (not waiting) == whole
    if not whole:
        number = int(waiting["cat"].removeprefix("cat_frame_").removesuffix(".png"))
        assert number not in numbers
        assert set(range(number)) <= numbers, "the first one that is missing"


def test_a_text_of_exactly_the_name_overrides_the_suffixes(box: Box) -> None:
    box.put("cat.png", "cat.txt", "cat_end.png", "cat_end.txt")
    assert sorted(group.name for group in box.settled().ready) == ["cat", "cat_end"]


def test_names_are_the_same_composed_or_decomposed(box: Box) -> None:
    box.put(unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.txt"))
    assert len(box.settled().ready) == 1


def test_folders_keep_equal_names_apart(box: Box) -> None:
    box.put("a/cat.png", "b/cat.txt", "c/d/cat.png", "c/d/cat.txt")
    assert [(group.folder, group.name) for group in box.settled().ready] == [("c/d", "cat")]


@pytest.mark.parametrize(
    ("files", "name", "missing"),
    [
        (["cat.png"], "cat", "cat.txt"),
        (["cat.txt"], "cat", "cat.png"),
        (["cat_end.png", "cat.txt"], "cat", "cat.png"),
        (["cat.png", "cat.jpg", "cat.txt"], "cat", "only one of cat.jpg and cat.png may stay"),
        (
            ["cat.png", "cat.txt", "cat_end.png", "cat.end.png"],
            "cat",
            "only one of cat.end.png and cat_end.png",
        ),
        (["cat_frame_0.png", "cat.txt"], "cat", "cat_frame_1.png"),
        (["cat_frame_0.jpg", "cat_frame_1.jpg", "cat_frame_3.jpg", "cat.txt"], "cat", "cat_frame_2.jpg"),
        (["cat_frame_1.png", "cat_frame_2.png", "cat.txt"], "cat", "cat_frame_0.png"),
        (["cat_frame_0.png", "cat_frame_1.png"], "cat", "cat.txt"),
        (["cat_frame_0.png", "cat_frame_1.png", "cat.txt", "cat.png"], "cat", "cat.png and the chain"),
        (
            ["cat_frame_0.png", "cat_frame_1.png", "cat.txt", "cat_end.png"],
            "cat",
            "cat_end.png and the chain",
        ),
        (["cat_frame_0.png", "cat_frame_1.png", "cat_frame_01.png", "cat.txt"], "cat", "only one of"),
        (["cat.gif"], "cat.gif", "not of a known type"),
    ],
)
def test_what_is_no_job_waits_with_the_reason(box: Box, files: list[str], name: str, missing: str) -> None:
    box.put(*files)
    assert missing in box.waiting()[name]


def test_an_empty_picture_waits(box: Box) -> None:
    box.put("cat.png", content="")
    box.put("cat.txt")
    assert "empty" in box.waiting()["cat"]


def test_a_file_of_unknown_type_blocks_no_other(box: Box) -> None:
    box.put("cat", "cat.mov", "cat.png", "cat.txt", "cat.mov.png", "cat.mov.txt")
    assert sorted(group.name for group in box.settled().ready) == ["cat", "cat.mov"]
    assert "cat.mov is not of a known type" in box.waiting()["cat.mov"]


def test_a_name_too_long_to_travel_waits(box: Box) -> None:
    box.put("猫" * 80 + ".png", "猫" * 80 + ".txt")
    assert ["has a name of more than 180 bytes" in missing for missing in box.waiting().values()] == [True]


def test_a_prompt_in_the_config_stands_in_for_the_text(box: Box) -> None:
    box.put("cat.png")
    box.inbox = Inbox(box.root, SETTLE, now=lambda: box.time, prompted=True)
    assert [group.name for group in box.settled().ready] == ["cat"]


def test_defaults_are_found_in_any_case_of_their_extension(box: Box) -> None:
    box.put("a/b/cat.png")
    box.put("_defaults.TOML", content='prompt = "it moves"')
    box.put("a/_defaults.toml", "c/_defaults.toml", content="steps = 3")
    (group,) = box.settled().ready
    assert group.defaults == ["_defaults.TOML", "a/_defaults.toml"]


def test_links_wait_and_are_not_followed(box: Box, tmp_path: Path) -> None:
    box.put("cat.txt")
    (box.root / "cat.png").symlink_to("/etc/hostname")
    assert "not a regular file" in box.waiting()["cat"]


def test_defaults_that_are_a_pipe_hold_back_jobs_and_not_the_daemon(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    os.mkfifo(box.root / "_defaults.toml")
    assert box.waiting() == {"cat": "_defaults.toml is not a regular file: copy the file itself here"}


def test_settings_nested_without_end_are_a_mistake_like_any_other(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    box.put("_defaults.toml", content="a = " + "[" * 8000)
    assert "_defaults.toml is not TOML" in box.waiting()["cat"]
    box.put("_defaults.toml", content="# " + "x" * 100_000)
    assert "more than 8192 bytes" in box.waiting()["cat"]


def test_a_name_that_is_not_utf8_waits_and_can_be_printed(box: Box) -> None:
    Path(os.fsdecode(os.fsencode(box.root) + b"/caf\xe9.png")).write_text("x")
    ((name, missing),) = box.waiting().items()
    assert "not UTF-8" in missing
    (name + missing).encode()


def test_a_prompt_in_the_settings_stands_in_for_the_text(box: Box) -> None:
    box.put("a/cat.png", "b/dog.png", "c/fox.png", "c/d/owl.png")
    box.put("a/cat.toml", content='prompt = ""')
    box.put("b/dog.toml", content="steps = 3")
    box.put("c/_defaults.toml", content='prompt = "it moves"')
    assert sorted(group.name for group in box.settled().ready) == ["cat", "fox", "owl"]
    assert box.waiting() == {"dog": "dog.txt"}


def test_a_mistake_in_the_defaults_holds_jobs_back_and_fails_none(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    box.put("_defaults.toml", content="steps = 0")
    assert box.waiting() == {"cat": "_defaults.toml: steps must be 1 to 100, got 0"}


def test_a_mistake_in_a_jobs_own_settings_lets_it_be_taken_and_fail(box: Box) -> None:
    box.put("cat.png", "cat.txt")
    box.put("cat.toml", content="steps = 0")
    assert len(box.settled().ready) == 1


def test_what_is_being_written_is_ignored(box: Box) -> None:
    box.put(".cat.png.Xa3", "cat.png.part", "cat.tmp", "cat.crdownload", "cat.txt~", ".~lock.cat.txt#")
    box.put("~syncthing~cat.png.tmp", ".hidden/cat.png", ".hidden/cat.txt", "cat.PART")
    scan = box.settled()
    assert (scan.ready, scan.waiting) == ((), ())


def test_a_companion_that_missed_its_job_names_it(box: Box) -> None:
    box.put("cat_end.png")
    box.inbox.scan()
    box.time += SETTLE
    (waiting,) = box.inbox.scan(lambda names: {each: f"job of {each[1]}" for each in names}).waiting
    assert "job of cat" in waiting.missing


def test_the_inbox_itself_gone_is_an_error_and_not_an_empty_inbox(box: Box) -> None:
    with pytest.raises(OSError, match="No such file"):
        Inbox(box.root / "gone", SETTLE).scan()


def test_two_spellings_of_one_accent_are_told_apart_in_words(box: Box) -> None:
    box.put("caf\u00e9.png", "cafe\u0301.png", "caf\u00e9.txt")
    assert "the accents are written in two ways" in box.waiting()["caf\u00e9"]


def test_a_name_that_grows_when_it_is_normalized_is_too_long_as_well(box: Box) -> None:
    """U+1D160 becomes three characters: 40 of them fit into the inbox and not into the outbox."""
    name = "\U0001d160" * 40
    box.put(f"{name}.png", f"{name}.txt")
    assert all("more than 180 bytes" in missing for missing in box.waiting().values())


@pytest.mark.parametrize("suffix", ["_end", ".end", "_last_frame"])
def test_a_name_with_a_line_break_has_companions_too(box: Box, suffix: str) -> None:
    box.put("a\nb.png", "a\nb.txt", f"a\nb{suffix}.png")
    assert box.roles() == [{"image": ["a\nb.png"], "text": ["a\nb.txt"], "end": [f"a\nb{suffix}.png"]}]


def test_nothing_is_listed_through_a_symbolic_link(
    box: Box, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "cat.png").write_text("x")
    (outside / "cat.txt").write_text("x")
    (box.root / "folder").symlink_to(outside)
    (box.root / "dog.png").symlink_to(outside / "cat.png")
    reason = "{} is not a regular file: copy the file itself here"
    assert box.waiting() == {"folder": reason.format("folder"), "dog": reason.format("dog.png")}


def test_a_folder_that_becomes_a_link_while_it_is_looked_at_is_not_followed(
    box: Box, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "cat.png").write_text("x")
    (box.root / "folder").mkdir()

    def swap_and_open(root: Path, folder: str) -> object:
        if folder:
            (root / folder).rmdir()
            (root / folder).symlink_to(outside)
        return folder_below(root, folder)

    monkeypatch.setattr(listing, "folder_below", swap_and_open)
    assert list(listing.look_through(box.root).files) == ["folder"]


def test_a_folder_with_too_many_files_is_named_and_the_others_are_looked_at(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_FILES", 4)
    box.put("cat.png", "cat.txt", *(f"full/{number}.txt" for number in range(9)))
    assert "holds too many files" in box.waiting()["full"]
    assert [group.name for group in box.settled().ready] == ["cat"]
    box.put(*(f"{number}.txt" for number in range(9)))
    assert set(box.waiting()) == {".", "full"}


def test_a_folder_too_deep_for_the_outbox_is_named(box: Box) -> None:
    deep = "/".join(["d" * 100] * 11)
    box.put(f"{deep}/cat.png")
    assert "lies too deep" in box.waiting()["d" * 100]


def test_settings_files_are_read_once_and_lost_jobs_looked_up_once(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(inbox, "read_settings_file", lambda path, origin: asked.append(origin) or {})
    box.put("_defaults.toml", "a.png", "b.png", "c.txt")
    box.inbox.scan()
    box.time += SETTLE

    def taken(names: Collection[Name]) -> dict[Name, str]:
        asked.extend(name for _, name in names)
        return {}

    for _ in range(3):
        box.inbox.scan(taken)
    assert asked == ["_defaults.toml", "c"]
    box.put("_defaults.toml", content="steps = 3")
    box.inbox.scan()
    box.time += SETTLE
    box.inbox.scan(taken)
    assert asked == ["_defaults.toml", "c"] * 2


def test_an_error_of_our_own_about_one_group_does_not_stop_the_others(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, origin: str) -> dict[str, object]:
        raise ZeroDivisionError("what a fuzzed file may lead to")

    monkeypatch.setattr(inbox, "read_settings_file", fail)
    box.put("cat.png", "cat.toml", "dog.png", "dog.txt")
    scan = box.settled()
    assert [group.name for group in scan.ready] == ["dog"]
    assert "ZeroDivisionError" in scan.waiting[0].missing


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
suffixes = st.sampled_from(
    [".png", ".JPG", ".txt", ".toml", "_end.png", ".end.webp", "_first_frame.png", "_frame_7.png", ".pdf"]
)


@given(files=st.lists(st.builds("".join, st.tuples(names, suffixes)), unique=True, max_size=12))
def test_every_file_is_in_exactly_one_group(files: list[str]) -> None:
    grouped = [path for group in group_files(files) for path in group.paths]
    assert sorted(grouped) == sorted(path for path in files if path != "_defaults.toml")


NOT_INBOX = (
    *("#recycle", "#snapshot", "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "@sharebin", "@Transcode"),
    *("$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "system volume information", "RECYCLER"),
    *(
        "__MACOSX",
        "Network Trash Folder",
        "Temporary Items",
        "~snapshot",
        "lost+found",
        ".recycle",
        ".Trash-0",
    ),
)


def test_recycle_bins_and_system_folders_of_a_share_are_ignored(box: Box) -> None:
    for folder in NOT_INBOX:
        box.put(f"{folder}/cat.png", f"{folder}/cat.txt", f"deep/{folder}/dog.png")
    box.put(
        "Icon\r", "icon\uf00d", "ehthumbs.db", "ehthumbs_vista.db", "Thumbs.db", "desktop.ini", ".DS_Store"
    )
    box.put("cat.png:Zone.Identifier", "Thumbs.db:encryptable", "cat.png.!sync")
    scan = box.settled()
    assert (scan.ready, scan.waiting) == ((), ())


@pytest.mark.parametrize(
    "folder", ["#recycled", "@tmp2", "my @tmp", "recycler", "#Snapshots", "Icons", "$RECYCLE"]
)
def test_a_folder_with_a_similar_name_is_scanned(box: Box, folder: str) -> None:
    box.put(f"{folder}/Icon.png", f"{folder}/Icon.txt")
    assert [group.folder for group in box.settled().ready] == [folder]


CONFLICT_COPIES = {
    " (conflicted copy 2026-11-28 101112)": "Nextcloud or ownCloud",
    " (conflicted copy Ann B. 2026-11-28 101112)": "Nextcloud or ownCloud",
    " (case clash from 2026-11-28 101112)": "Nextcloud or ownCloud",
    "_conflict-20261128-101112": "ownCloud",
    "_conflict_ann-20261128-101112": "ownCloud",
    ".sync-conflict-20261128-101112-ABCDEFG": "Syncthing",
    ".sync-conflict-20261128-101112": "Syncthing",
    " (Ann's conflicted copy 2026-11-28)": "Dropbox",
    " (fred.example.com's conflicted copy 2026-11-28 (1))": "Dropbox",
    " (conflicted copy 2026-11-28)": "Dropbox",
    " (In Konflikt stehende Kopie von Ann 2026-11-28)": "Dropbox",
    " (Anns in Konflikt stehende Kopie 2026-11-28)": "Dropbox",
    " (Case Conflict)": "Dropbox",
    " (Case Conflict 1)": "Dropbox",
    " (Unicode Encoding Conflict)": "Dropbox",
    " (SFConflict ann@example.org 2026-11-28-10-11-12)": "Seafile",
    "_Ann-PC_Nov-28-1011-2026_CaseConflict_1": "Synology Drive",
}


@pytest.mark.parametrize(("mark", "program"), CONFLICT_COPIES.items())
def test_conflict_copies_wait_with_a_hint_and_are_no_job(box: Box, mark: str, program: str) -> None:
    box.put(
        "cat.png",
        "cat.txt",
        f"cat{mark}.png",
        f"cat{mark}.txt",
        f"café_end{mark}.png",
        f"_defaults{mark}.toml",
    )
    scan = box.settled()
    assert [group.name for group in scan.ready] == ["cat"]
    hints = {waiting.name: waiting.missing for waiting in scan.waiting}
    assert hints == {
        f"{name}{mark}": f"{name}{mark}{suffix} is a conflict copy of {name}{suffix} ({program}): "
        "delete it, or rename it to have it made"
        for name, suffix in (("cat", ".png"), ("café_end", ".png"), ("_defaults", ".toml"))
    }


@pytest.mark.parametrize(
    "name",
    [
        *("conflict", "cat_conflict", "the conflicted cat", "cat (conflict)", "cat (conflicted)"),
        *("cat-conflict-2026", "cat.sync-conflict", "(conflicted copy 2026-11-28)", "cat (copy 2026-11-28)"),
        *("a (case conflict of law)", "cat_conflict-1-2"),
    ],
)
def test_a_name_that_only_mentions_a_conflict_is_no_conflict_copy(box: Box, name: str) -> None:
    box.put(f"{name}.png", f"{name}.txt")
    assert [group.name for group in box.settled().ready] == [name]


def test_a_conflict_copy_that_settings_name_as_a_keyframe_is_wanted(box: Box) -> None:
    keyframe = "cat (conflicted copy 2026-11-28 101112).png"
    box.put("cat.png", "cat.txt", keyframe)
    box.put("cat.toml", content=f'keyframes = {{"0" = "{keyframe}"}}')
    (group,) = box.settled().ready
    assert group.only("keyframe-0") == keyframe


def test_a_conflict_copy_of_settings_takes_no_keyframe_from_the_job(box: Box) -> None:
    box.put("cat.png", "cat.txt", "key.png")
    for name in ("cat", "cat.sync-conflict-20261128-101112-ABCDEFG"):
        box.put(f"{name}.toml", content='keyframes = {"0" = "key.png"}')
    (group,) = box.settled().ready
    assert (group.name, group.only("keyframe-0")) == ("cat", "key.png")


def test_the_same_scan_finds_our_own_hidden_files(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    part = ".framepackd-20260101-000000-abcdef-cat.png.part"
    box.put(part, f"sub/{part}", "sub/.hidden", "cat.png.part", f".hidden/{part}")
    walked: list[str] = []
    monkeypatch.setattr(
        listing, "folder_below", lambda root, folder: walked.append(folder) or folder_below(root, folder)
    )
    scan = box.inbox.scan()
    assert set(scan.parts) == {part, f"sub/{part}"}
    assert scan.parts[part] == pytest.approx((box.root / part).stat().st_ctime)
    assert walked == ["", "sub"]
    monkeypatch.setattr(listing, "MAX_PARTS", 1)
    assert len(box.inbox.scan().parts) == 1


REASONS = {
    errno.ENOENT: "is not there: mount its share",
    errno.ENOTDIR: "is no folder: move away",
    errno.EACCES: "may not be read by this user: correct its permissions",
    errno.EPERM: "may not be read by this user: correct its permissions",
    errno.ESTALE: "unmount it and mount it again",
    errno.EIO: "its disk or share fails",
    errno.EHOSTDOWN: "whose server does not answer",
    errno.EBUSY: "cannot be read (Device or resource busy)",
}


@pytest.mark.parametrize(("number", "reason"), REASONS.items())
def test_an_inbox_that_cannot_be_read_is_explained(
    box: Box, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    box.put("sub/cat.png")
    with monkeypatch.context() as patched:
        patched.setattr(listing, "folder_below", refuse)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))) as raised:
            box.inbox.scan()
    problem = inbox.trouble(box.root, raised.value)
    assert problem.code == "inbox"
    assert f"{box.root} {reason}" in problem.text or (
        reason in problem.text and str(box.root) in problem.text
    )


@dataclass
class Closed:
    """An entry of a folder without the right to search it."""

    name: str

    def stat(self, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("folder", ["", "locked"])
def test_a_folder_whose_files_cannot_be_checked_is_reported_and_not_taken_for_empty(
    box: Box, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    box.put("locked/dog.png", "cat.png", "cat.txt")
    scandir = os.scandir

    def closing(path: Path) -> object:
        entries: list[object] = list(scandir(path))
        if Path(path).resolve() == (box.root / folder).resolve():
            entries = [Closed(name) for name in os.listdir(path)]  # noqa: PTH208 - names are all it gives
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", closing)
    if not folder:
        with pytest.raises(PermissionError):
            box.inbox.scan()
    else:
        scan = box.settled()
        assert [group.name for group in scan.ready] == ["cat"]
        assert ["may not be read" in waiting.missing for waiting in scan.waiting] == [True]


def test_a_file_whose_status_cannot_be_read_waits_and_hides_no_other(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put("dog.png", "cat.png", "cat.txt")
    scandir = os.scandir

    class Damaged(Closed):
        def stat(self, **_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

    def failing(path: Path) -> object:
        entries = [Damaged(entry.name) if entry.name == "dog.png" else entry for entry in scandir(path)]
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", failing)
    scan = box.settled()
    assert [group.name for group in scan.ready] == ["cat"]
    assert ["cannot be checked (Input/output error)" in each.missing for each in scan.waiting] == [True]
