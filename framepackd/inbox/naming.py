"""Groups files that belong together by the naming rules of the inbox: pairs, chains, keyframes."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from framepack_core.media import heif
from framepackd.inbox.listing import Signature
from framepackd.settings.job_settings import DEFAULTS_FILE

PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".avif")
SAVE_ANEW = "if it is a picture, save it as PNG or JPEG"
MAX_NAME = 180  # bytes, of the 255 there are: ours get prefixes and suffixes on the way
# A name may hold line breaks, and end in one.
END_FRAME = re.compile(r"(?P<name>.+)(\.end|_end|_last_frame)\Z", re.DOTALL)
FIRST_FRAME = re.compile(r"(?P<name>.+)_first_frame\Z", re.DOTALL)
FRAME = re.compile(r"(?P<name>.+)_frame_(?P<number>[0-9]+)\Z", re.DOTALL)  # of a chain
KEYFRAME = re.compile(r"(?P<name>.+)_section_(?P<number>[0-9]+)\Z", re.DOTALL)
FRAME_DIFF = re.compile(r"(?P<name>.+)_frame_diff\Z", re.DOTALL)
SUFFIXES = {END_FRAME: "end", FIRST_FRAME: "image", FRAME: "frame", KEYFRAME: "keyframe"}
# In the order in which they are told.
ROLES = (
    *("image", "frame", "video", "recipe", "text", "end", "keyframe", "settings", "latents"),
    *("record", "diff", "unknown"),
)
# One to be made longer; with it, as they were delivered, NAME.json and the latents. Beside a picture, one of
# ours is its recipe: it says how it was made.
VIDEO = ".mp4"
LATENTS = ".latents"
OF_A_VIDEO = ("video", "recipe", "latents", "record")


@dataclass
class Group:
    """The files of one NAME, by the role they play; paths are relative to the inbox."""

    folder: str
    name: str
    files: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    defaults: list[str] = field(
        default_factory=list
    )  # _defaults.toml files that hold for it, outermost first
    keyframes: Mapping[int, str] = field(default_factory=dict)  # files its settings name, by section
    unread: dict[str, str] = field(
        default_factory=dict
    )  # by role, what is called like its files and is not read
    signatures: dict[str, Signature] = field(default_factory=dict)  # of all of them, when they had settled

    @property
    def paths(self) -> list[str]:
        """Give all files, the picture and its text first."""
        return [path for role in self.roles for path in sorted(self.files[role])]

    @property
    def roles(self) -> list[str]:
        """Give the roles of its files, the picture first; frames of a chain by their numbers."""

        def place(role: str) -> tuple[int, int]:
            kind, _, number = role.partition("-")
            return ROLES.index(kind), int(number or 0)

        return sorted((role for role in self.files if self.files[role]), key=place)

    @property
    def frames(self) -> list[str]:
        """Give the roles of a chain's frames, frame-0 first."""
        return [role for role in self.roles if role.startswith("frame-")]

    def only(self, role: str) -> str | None:
        """Give the file of a role that exists once, if at all."""
        paths = self.files.get(role)
        return paths[0] if paths else None


def group_files(
    paths: Iterable[str], keyframes: Mapping[str, Mapping[int, str]] | None = None
) -> list[Group]:
    """Sort files into groups of one NAME each, by the naming rules; ``_defaults.toml`` belongs to none.

    ``keyframes`` are the pictures that settings name, by the settings' paths: those that belong to nothing
    else go to their NAME. Names are compared as NFC: macOS sends them decomposed.
    """
    keyframes = keyframes or {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[folder_of(path)].append(path)
    return [
        group for folder in sorted(by_folder) for group in _group_folder(folder, by_folder[folder], keyframes)
    ]


def _group_folder(
    folder: str, paths: list[str], keyframes: Mapping[str, Mapping[int, str]]
) -> Iterable[Group]:
    own_names = {stem_of(path) for path in paths if suffix_of(path) in (".txt", ".toml")}
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
        claim = named.get(unicodedata.normalize("NFC", name_of(path))) if named else None
        if claim and is_picture(path) and (name not in own_names or (name == claim[0] and "-" in role)):
            name, role = claim
        # A file of another kind shares its fate with nobody, whatever its name.
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
    """Say to which NAME a file belongs, and as what."""
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
    """Say to which NAME a picture belongs, and as what."""
    if stem not in own_names:  # a text of exactly this name wins over the suffixes
        for pattern, role in SUFFIXES.items():
            match = pattern.match(stem)
            if match:
                number = f"-{int(match['number'])}" if "number" in match.groupdict() else ""
                return match["name"], role + number
    return stem, "image"


def defaults_by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Find, of these paths, the ``_defaults.toml`` files, by the folder that they are in."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for path in paths if is_defaults(path)):
        found[folder_of(path)].append(path)
    return found


def defaults_above(folder: str, defaults: Mapping[str, list[str]]) -> list[str]:
    """List, of ``defaults_by_folder``, the files that hold for a folder, the outermost first.

    >>> found = defaults_by_folder(["_defaults.toml", "a/b/_defaults.TOML", "c/_defaults.toml"])
    >>> defaults_above("a/b", found)
    ['_defaults.toml', 'a/b/_defaults.TOML']
    """
    return [path for above in folders_above(folder) for path in defaults.get(above, ())]


def folders_above(folder: str) -> list[str]:
    """List the folders from the inbox itself, which is empty, down to this one.

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
    """Say whether a file is of a type that pictures have which can be read here."""
    suffix = suffix_of(path)
    return suffix in PICTURES or (suffix in heif.ENDINGS and heif.available())


def picture_types() -> str:
    """List the types of pictures that can be read here."""
    return ", ".join((*PICTURES, *(heif.ENDINGS if heif.available() else ())))


def why_unread(path: str) -> str:
    """Say of a file whose type is not a picture's that it is not, and what to do."""
    told = f"{name_of(path)} is not of a known type ({picture_types()}, .txt, .toml)"
    return f"{told}: {heif.NOT_HERE if suffix_of(path) in heif.ENDINGS else SAVE_ANEW}"
