"""Groups files that belong together by the naming rules of the inbox: pairs, chains, keyframes."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from framepack_core.media import heif
from framepackd.inbox.listing import Signature
from framepackd.jobs.drafts import ROLE, SUFFIX
from framepackd.settings.job_settings import DEFAULTS_FILE

PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".avif")
SAVE_ANEW = "if it is a picture, save it as PNG or JPEG"
MAX_NAME = 180  # bytes, of the 255 that file systems allow: framepackd adds prefixes and suffixes
# Names may hold line breaks, hence \Z and DOTALL.
END_FRAME = re.compile(r"(?P<name>.+)(\.end|_end|_last_frame)\Z", re.DOTALL)
FIRST_FRAME = re.compile(r"(?P<name>.+)_first_frame\Z", re.DOTALL)
FRAME = re.compile(r"(?P<name>.+)_frame_(?P<number>[0-9]+)\Z", re.DOTALL)  # of a chain
KEYFRAME = re.compile(r"(?P<name>.+)_section_(?P<number>[0-9]+)\Z", re.DOTALL)
FRAME_DIFF = re.compile(r"(?P<name>.+)_frame_diff\Z", re.DOTALL)
SUFFIXES = {END_FRAME: "end", FIRST_FRAME: "image", FRAME: "frame", KEYFRAME: "keyframe"}
# In the order in which a group lists them.
ROLES = (
    *("image", "frame", "video", "recipe", "text", "end", "keyframe", "settings", "latents"),
    *("record", ROLE, "diff", "unknown"),
)
# A video to extend; with it may come NAME.json and the latents, as they were delivered. Next to a picture, a
# video of ours is a recipe: its settings are used.
VIDEO = ".mp4"
LATENTS = ".latents"
OF_A_VIDEO = ("video", "recipe", "latents", "record")


@dataclass
class Group:
    """The files of one NAME, by the role they play; paths are relative to the inbox."""

    folder: str
    name: str
    files: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    # The _defaults.toml files that hold for it, outermost first.
    defaults: list[str] = field(default_factory=list)
    keyframes: Mapping[int, str] = field(default_factory=dict)  # files that its settings name, by section
    # By role, files of an unknown type that have the name of one of its files.
    unread: dict[str, str] = field(default_factory=dict)
    signatures: dict[str, Signature] = field(default_factory=dict)  # of all its files, when they had settled

    @property
    def paths(self) -> list[str]:
        """Give all files, the picture and its text first."""
        return [path for role in self.roles for path in sorted(self.files[role])]

    @property
    def roles(self) -> list[str]:
        """Give the roles of its files, the picture first, frames of a chain by number."""

        def place(role: str) -> tuple[int, int]:
            kind, _, number = role.partition("-")
            return ROLES.index(kind), int(number or 0)

        return sorted((role for role in self.files if self.files[role]), key=place)

    @property
    def frames(self) -> list[str]:
        """Give the roles of a chain's frames, frame-0 first."""
        return [role for role in self.roles if role.startswith("frame-")]

    def only(self, role: str) -> str | None:
        """Give the file of a role that has at most one; None if it has none."""
        paths = self.files.get(role)
        return paths[0] if paths else None


def group_files(
    paths: Iterable[str],
    keyframes: Mapping[str, Mapping[int, str]] | None = None,
    records: Collection[str] = (),
) -> list[Group]:
    """Sort files into groups of one NAME each, by the naming rules; ``_defaults.toml`` belongs to none.

    ``keyframes`` are the pictures that settings files name, by the paths of these: a picture that belongs to
    nothing else joins the group of the settings. ``records`` are the paths of records of drafts: dropped
    again with its pictures, one asks for the final. Names are compared as NFC: macOS sends them decomposed.
    """
    keyframes = keyframes or {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[folder_of(path)].append(path)
    return [
        group
        for folder in sorted(by_folder)
        for group in _group_folder(folder, by_folder[folder], keyframes, records)
    ]


def _group_folder(
    folder: str, paths: list[str], keyframes: Mapping[str, Mapping[int, str]], records: Collection[str]
) -> Iterable[Group]:
    own_names = {stem_of(path) for path in paths if suffix_of(path) in (".txt", ".toml")}
    recorded = {path: stem_of(path).removesuffix(SUFFIX) for path in paths if path in records}
    own_names |= {*recorded.values()}
    named = {
        unicodedata.normalize("NFC", file): (stem_of(path), f"keyframe-{number}")
        for path in sorted(keyframes.keys() & set(paths), reverse=True)
        for number, file in keyframes[path].items()
    }
    videos = {stem_of(path) for path in paths if suffix_of(path) == VIDEO}
    groups: dict[tuple[str, bool], Group] = {}
    for path in sorted(paths):
        if is_defaults(path):
            continue
        name, role = _owner(path, own_names, videos)
        if path in recorded:
            name, role = recorded[path], ROLE
        claim = named.get(unicodedata.normalize("NFC", name_of(path))) if named else None
        if claim and is_picture(path) and (name not in own_names or (name == claim[0] and "-" in role)):
            name, role = claim
        # A file of unknown type forms its own group and blocks no other.
        group = groups.setdefault((name, role == "unknown"), Group(folder, name))
        group.files[role].append(path)
        if path in keyframes:
            group.keyframes = keyframes[path]
    for path in [path for _, other in groups if other for path in groups[_, other].files["unknown"]]:
        name, role = _role(stem_of(path), own_names)
        if (name, False) in groups and role not in groups[name, False].files:
            groups[name, False].unread[role] = path
    return groups.values()


def _owner(path: str, own_names: set[str], videos: set[str]) -> tuple[str, str]:
    """Give the NAME that a file belongs to, and its role."""
    stem, suffix = stem_of(path), suffix_of(path)
    if suffix == VIDEO:
        return stem, "video"
    if suffix == ".json" and stem in videos:
        return stem, "record"
    if suffix == ".safetensors" and stem.endswith(LATENTS) and stem.removesuffix(LATENTS) in videos:
        return stem.removesuffix(LATENTS), "latents"
    if suffix == ".toml":
        return stem, "settings"
    if suffix == ".txt":
        difference = FRAME_DIFF.match(stem)
        return (difference["name"], "diff") if difference else (stem, "text")
    if not is_picture(path):
        return name_of(path), "unknown"
    return _role(stem, own_names)


def _role(stem: str, own_names: set[str]) -> tuple[str, str]:
    """Give the NAME that a picture belongs to, and its role."""
    if stem not in own_names:  # a text of exactly this name overrides the suffixes
        for pattern, role in SUFFIXES.items():
            match = pattern.match(stem)
            if match:
                number = f"-{int(match['number'])}" if "number" in match.groupdict() else ""
                return match["name"], role + number
    return stem, "image"


def defaults_by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Give the ``_defaults.toml`` files among these paths, by folder."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for path in paths if is_defaults(path)):
        found[folder_of(path)].append(path)
    return found


def defaults_above(folder: str, defaults: Mapping[str, list[str]]) -> list[str]:
    """List those files of ``defaults_by_folder`` that hold for a folder, the outermost first.

    >>> found = defaults_by_folder(["_defaults.toml", "a/b/_defaults.TOML", "c/_defaults.toml"])
    >>> defaults_above("a/b", found)
    ['_defaults.toml', 'a/b/_defaults.TOML']
    """
    return [path for above in folders_above(folder) for path in defaults.get(above, ())]


def folders_above(folder: str) -> list[str]:
    """List the folders from the inbox itself, "", down to this one.

    >>> folders_above("a/b")
    ['', 'a', 'a/b']
    """
    folders = [folder]
    while folders[-1]:
        folders.append(folder_of(folders[-1]))
    return folders[::-1]


def is_defaults(path: str) -> bool:
    """Say whether a file holds the defaults of its folder."""
    stem, _, suffix = name_of(path).rpartition(".")
    return f"{stem}.{suffix.lower()}" == DEFAULTS_FILE


def folder_of(path: str) -> str:
    """Give the folder of a path, relative to the inbox; empty for the inbox itself."""
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    """Give the file name of a path."""
    return path.rpartition("/")[2]


def stem_of(path: str) -> str:
    """Give the file name of a path without its type, composed as NFC."""
    return unicodedata.normalize("NFC", name_of(path).rpartition(".")[0])


def suffix_of(path: str) -> str:
    """Give the type of a file, with its dot, in lower case; empty if it has none."""
    return "." + path.rpartition(".")[2].lower() if "." in name_of(path) else ""


def is_picture(path: str) -> bool:
    """Say whether a file has the type of a picture that can be read here."""
    suffix = suffix_of(path)
    return suffix in PICTURES or (suffix in heif.ENDINGS and heif.available())


def picture_types() -> str:
    """List the types of pictures that can be read here."""
    return ", ".join((*PICTURES, *(heif.ENDINGS if heif.available() else ())))


def why_unread(path: str) -> str:
    """Say that a file is of an unknown type, and what to do."""
    remedy = heif.NOT_HERE if suffix_of(path) in heif.ENDINGS else SAVE_ANEW
    return f"{name_of(path)} is not of a known type: {remedy}"
