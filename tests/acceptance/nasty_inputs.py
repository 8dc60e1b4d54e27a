"""What people, programs and attackers may drop, each with what has to become of it."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from framepack_core.media import heif
from tests.acceptance import nasty_pictures as make
from tests.acceptance.nasty_pictures import GOOD
from tests.core.models.loras import make_lora, stored
from tests.golden.replay import tiny_spec

DONE, FAILED, WAITING, IGNORED = "done", "failed", "waiting", "ignored"
CANARY = "the canary has been eaten"  # must never get out of the folder outside


@dataclass(frozen=True)
class Case:
    """Something dropped into a folder of its own, and its outcome with what is said about it."""

    name: str
    drop: Callable[[Path, Path], None]  # the folder, and a folder outside the inbox
    outcome: str
    said: str = ""


def pair(
    picture: bytes = GOOD, text: bytes = b"pan left", toml: str | bytes = "", *, suffix: str = ".png"
) -> Callable[[Path, Path], None]:
    def drop(folder: Path, outside: Path) -> None:
        (folder / f"x{suffix}").write_bytes(picture)
        (folder / "x.txt").write_bytes(text)
        if toml:
            (folder / "x.toml").write_bytes(toml if isinstance(toml, bytes) else toml.encode())

    return drop


def cases() -> Iterator[Case]:
    """Give them all; those that only root can make are left out for others."""
    for name, picture, suffix in make.good_pictures():
        yield Case(f"picture {name}", pair(picture, suffix=suffix), DONE)
    for name, picture, said in make.bad_pictures():
        yield Case(f"picture {name}", pair(picture), FAILED, said)
    yield Case("strip", pair(make.saved(make.noise(size=(1, 20000)))), DONE)
    strip = pair(make.saved(make.noise(size=(1, 20000))), toml="width = 512\nheight = 512")
    yield Case("strip for a large video", strip, FAILED, "too far from the shape")
    for name, text, outcome, said in texts():
        yield Case(f"text {name}", pair(text=text), outcome, said)
    for name, toml, said in bad_settings():
        yield Case(f"settings {name}", pair(toml=toml), FAILED, said)
    for name in NAMES:
        yield Case(f"named {name!a}", named(name), FAILED, "is empty")
    yield Case("named with a line break, done", named("a\nb", b"pan left"), DONE)
    yield Case("named decomposed, done", named("cafe\u0301", b"pan left"), DONE)
    for name, setting, outcome, said in lora_settings():
        yield Case(f"LoRA {name}", pair(toml=f"loras = [{setting}]"), outcome, said)
    yield from special_files()
    yield from crowds()


def texts() -> Iterator[tuple[str, bytes, str, str]]:
    yield "with mark and line breaks of Windows", b"\xef\xbb\xbfpan\r\nleft\r\n", DONE, ""
    yield "that speaks to the terminal", b"\x1b]0;pwned\x07\x1b[2J pan left", DONE, ""
    yield "of tokens that mean something", b"<|eot_id|><|begin_of_text|>{}%s<image>", DONE, ""
    yield "of 60 KB", b"cat " * 15000, DONE, ""
    for name, content, said in (
        ("empty", b"", "is empty"),
        ("blank", b" \r\n\t\n", "is empty"),
        ("in UTF-16", "pan left".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("in UTF-16 without a mark", "pan left".encode("utf-16-le"), "is UTF-16: save it as UTF-8"),
        ("in UTF-16 the other way round", "pan left".encode("utf-16-be"), "is UTF-16: save it as UTF-8"),
        ("in UTF-32", "pan left".encode("utf-32"), "is UTF-32"),
        ("in Latin 1", "caf\u00e9".encode("latin-1"), "is not UTF-8"),
        ("cut in a letter", "caf\u00e9".encode()[:-1], "is not UTF-8"),
        ("of surrogates", b"\xed\xa0\x80", "is not UTF-8"),
        ("of 100 KB", b"cat " * 25000, "has 100000 bytes"),
        ("of zeros", bytes(1000), "null characters"),
        ("of pixels", make.GOOD_JPEG, "is not UTF-8"),
    ):
        yield name, content, FAILED, said


def put_loras(folder: Path) -> None:
    """Write the LoRAs that ``lora_settings`` names, for the tiny model."""
    folder.mkdir(parents=True)
    base = stored(tiny_spec())
    strange = {"lora_unet_double_blocks_77_img_mlp_fc1.lora_down.weight": torch.ones(1, 1)}
    scale = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.scale_weight": torch.ones(1)}
    flux = {"modelspec.architecture": "flux-1-dev/lora"}
    make_lora(folder / "converted.safetensors", "kohya-hunyuan", base, alpha=torch.tensor(2))
    make_lora(folder / "DOTS.SAFETENSORS", "converted", base)
    make_lora(folder / "fp8.safetensors", "diffusers", base, dtype=torch.float8_e4m3fn)
    make_lora(folder / "scaled.safetensors", "diffusers", base, dtype=torch.float8_e4m3fn, extra=scale)
    make_lora(folder / "flux.safetensors", "kohya-hunyuan", base, metadata=flux)
    make_lora(folder / "deep.safetensors", "kohya-hunyuan", base, extra=strange)
    (folder / "cut.safetensors").write_bytes((folder / "fp8.safetensors").read_bytes()[:-100])
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><title>Log in</title>")


def lora_settings() -> Iterator[tuple[str, str, str, str]]:
    yield "with whole numbers as alpha", '"converted.safetensors"', DONE, ""
    yield "in capitals, of a converter's names", '"DOTS.SAFETENSORS"', DONE, ""
    yield "of fp8", '"fp8.safetensors"', DONE, ""
    yield "of fp8 with scales", '"scaled.safetensors"', FAILED, "is not a plain LoRA"
    yield "of another family", '"flux.safetensors"', FAILED, "was made for FLUX.1"
    yield "of a deeper model", '"deep.safetensors"', FAILED, "fits the model only in part"
    yield "of a deeper model, allowed", '{file = "deep.safetensors", allow_partial = true}', DONE, ""
    yield "that is cut off", '"cut.safetensors"', FAILED, "a tensor reaches from"
    yield (
        "that is a web page",
        '"page.safetensors"',
        FAILED,
        "page.safetensors cannot be used (it is an HTML page)",
    )
    yield "out of the folder", '"../../outside/secret.safetensors"', FAILED, "loras.0.file"
    yield "that is not there", '"gone.safetensors"', FAILED, "there is no gone.safetensors"


def bad_settings() -> Iterator[tuple[str, str | bytes, str]]:
    for value in ('"/etc"', '"../../etc"', '"demo/../demo"', '"demo\\u0000"', '""', f'"{"x" * 8000}"'):
        yield f"model = {value[:20]}", f"model = {value}", "model must be one of"
    for value in ("1", '["demo"]', "{a = 1}"):
        yield f"model = {value}", f"model = {value}", "model"
    for key in ("image", "output", "inbox", "transformer", "end_image", "device", "__class__"):
        yield f"{key} = path", f'{key} = "/etc/passwd"', f"unknown key '{key}'"
    for wrong in (
        *("seed = -1", "seed = 4294967296", "seed = true", 'seed = "abc"', "seed = 2001-01-01"),
        *("seconds = nan", "seconds = inf", "seconds = 1e308", "seconds = -5", "seconds = 0"),
        *(
            "steps = 0",
            "steps = 1e9",
            "steps = [1]",
            "width = 33\nheight = 32",
            "width = 1048576\nheight = 32",
        ),
        *("crf = 99", "resolution = 1000000", 'cache = "rm"', "latent_window_size = 1000"),
    ):
        yield wrong.replace("\n", ", "), wrong, wrong.split()[0]
    yield "with a width alone", "width = 32\nresolution = 640", "height"
    yield "that say one thing twice", "cfg = 2\ntrue_cfg_scale = 2", "set the same"
    yield "of arrays without end", "seed = " + "[" * 8000, "is not TOML"
    yield "of tables without end", "seed = " + "{a = " * 1500, "is not TOML"
    yield "of dots without end", "seed" + ".a" * 4000 + " = 1", "too large to show"
    yield "of a number without end", "seed = 0x" + "f" * 8000, "seed must be"
    yield "of a decimal number without end", "seed = " + "9" * 8000, "is not TOML"
    yield "of 800 keys", "".join(f"k{number} = 1\n" for number in range(800)), "more mistakes"
    yield "that speak to the terminal", 'cache = "\\u001b[31m\\u202e\\u009b2J"', "cache must be"
    yield "with a key that does", '"\\u001b]0;pwned\\u0007" = 1', "unknown key"
    yield "of one long key", f'"{"k" * 8000}" = 1', "unknown key"
    yield "of 10 KB", "# " + "x" * 10000, "more than 8192 bytes"
    yield "in UTF-16", "seed = 1".encode("utf-16"), "is UTF-16: save it as UTF-8"
    yield "in UTF-16 without a mark", "seed = 1".encode("utf-16-le"), "is UTF-16: save it as UTF-8"
    yield "in Latin 1", "prompt = 'caf\u00e9'".encode("latin-1"), "is not UTF-8"
    yield "of zeros", bytes(100), "null characters"
    yield "that are none", "steps: 3\n", "is not TOML"
    yield "given twice", "seed = 1\nseed = 2", "is not TOML"


NAMES = (
    *("a\nb", "\n", "a\tb", "a\x1b[31mb", "\x1b]0;pwned\x07", "a\x9b2Jb", "\u202egnp.exe", "a\u200bb\u2066"),
    *(
        "a\x7fb",
        "\\",
        "a'b\"c",
        "$(touch pwned)",
        "; rm -rf x",
        "`id`",
        "-rf",
        "--config",
        " ",
        " x ",
        "%s%n",
    ),
    *(
        "{0}",
        "[red]x[b]",
        "a..",
        "a.mp4",
        "a.error",
        "NUL",
        "_defaults",
        "error",
        "#x#",
        "*",
        "~x",
        "x" * 170,
    ),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u0645\u0631\u062d\u0628\u0627", "\ufeffx", "x_001"),
)


def named(name: str, text: bytes = b"") -> Callable[[Path, Path], None]:
    def drop(folder: Path, outside: Path) -> None:
        (folder / f"{name}.png").write_bytes(GOOD)
        (folder / f"{name}.txt").write_bytes(text)

    return drop


def put(name: str, content: bytes = GOOD) -> Callable[[Path, Path], None]:
    """Put a file of that path beside what is there."""

    def drop(folder: Path, outside: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return drop


def beside_a_pair(name: str, place: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Put something under one of the names of a pair, or beside it."""

    def drop(folder: Path, outside: Path) -> None:
        pair()(folder, outside)
        (folder / name).unlink(missing_ok=True)
        place(folder / name, outside)

    return drop


def sparse(gigabytes: int) -> Callable[[Path, Path], None]:
    def place(path: Path, outside: Path) -> None:
        path.touch()
        os.truncate(path, gigabytes << 30)

    return place


def listen(path: Path, outside: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has room for 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def special_files() -> Iterator[Case]:
    kinds: dict[str, Callable[[Path, Path], None]] = {
        "a link": lambda path, outside: path.symlink_to(outside / f"secret{path.suffix}"),
        "a link to nothing": lambda path, outside: path.symlink_to("nowhere"),
        "a link to itself": lambda path, outside: path.symlink_to(path.name),
        "a link to a folder": lambda path, outside: path.symlink_to(outside),
        "a link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
        "a link to a pair's text": lambda path, outside: path.symlink_to("x.txt"),
        "a pipe": lambda path, outside: os.mkfifo(path),
        "a socket": listen,
    }
    if os.geteuid() == 0:
        kinds["a device"] = lambda path, outside: os.mknod(path, 0o20666, os.makedev(1, 5))
    for name in ("x.png", "x.txt", "x.toml", "_defaults.toml"):
        for kind, place in kinds.items():
            if name != "x.txt" or "pair" not in kind:
                yield Case(
                    f"{name} is {kind}", beside_a_pair(name, place), WAITING, f"{name} is not a regular"
                )
    for name in ("x.png", "x.txt", "x.toml", "_defaults.toml", "x_end.png"):
        yield Case(
            f"{name} of ten gigabytes", beside_a_pair(name, sparse(10)), WAITING, f"{name} has 10737418240"
        )
    link = beside_a_pair("x.txt", lambda path, outside: path.hardlink_to(outside / "linked.txt"))
    yield Case("a hard link", link, DONE)

    def strange_rights(folder: Path, outside: Path) -> None:
        pair()(folder, outside)
        for path in folder.iterdir():
            path.chmod(0o6777)

    yield Case("set-uid and executable", strange_rights, DONE)
    bad = {
        "x = [": "is not TOML",
        "steps = 0": "steps must be",
        "a = " + "[" * 8000: "is not TOML",
        "seed" + ".a" * 4000 + " = 1": "too large to show",
        "# " + "x" * 10000: "more than 8192 bytes",
    }
    for content, said in bad.items():
        drop = beside_a_pair("_defaults.toml", lambda path, _, content=content: path.write_text(content))  # type: ignore[misc] # a loop's value
        yield Case(f"_defaults.toml of {content[:12]}", drop, WAITING, said)
    drop = beside_a_pair("_defaults.toml", lambda path, _: path.write_text('model = "/etc"') and None)
    yield Case("_defaults.toml of model = /etc", drop, FAILED, "model must be one of")


def several(*drops: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def drop(folder: Path, outside: Path) -> None:
        for one in drops:
            one(folder, outside)

    return drop


def raw(*names: bytes) -> Callable[[Path, Path], None]:
    """Drop files under names that no text can spell."""

    def drop(folder: Path, outside: Path) -> None:
        for name in names:
            path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(GOOD)

    return drop


def crowds() -> Iterator[Case]:
    utf8 = "not UTF-8"
    yield Case("a name that is not UTF-8", raw(b"caf\xe9.png", b"caf\xe9.txt"), WAITING, utf8)
    yield Case("an ending that is not UTF-8", raw(b"x.png\xff"), WAITING, utf8)
    yield Case(
        "a folder that is not UTF-8", raw(b"caf\xe9/x.png", b"caf\xe9/x.txt"), WAITING, r"caf\udce9 has"
    )
    yield Case("a name of 255 bytes", put("x" * 251 + ".png"), WAITING, "more than 180 bytes")
    grows = several(put("\U0001d160" * 40 + ".png"), put("\U0001d160" * 40 + ".txt"))
    yield Case("a name that grows when normalized", grows, WAITING, "more than 180 bytes")
    twins = several(put("caf\u00e9.png"), put("cafe\u0301.png"), put("caf\u00e9.txt", b"pan left"))
    yield Case("one accent written in two ways", twins, WAITING, "two ways")
    yield Case("two types", several(pair(), put("x.jpg")), WAITING, "only one of x.jpg and x.png")
    yield Case(
        "two cases of an ending", several(pair(), put("x.PNG")), WAITING, "only one of x.PNG and x.png"
    )
    yield Case("two texts", several(pair(), put("x.TXT", b"pan")), WAITING, "only one of x.TXT and x.txt")
    yield Case("an empty picture", pair(b""), WAITING, "is empty (0 bytes)")
    yield Case("a picture alone", put("x.png"), WAITING, "x.txt")
    yield Case("a text alone", put("x.txt", b"pan left"), WAITING, "x.png")
    yield Case("settings alone", put("x.toml", b"prompt = 'a'"), WAITING, "x.png")
    yield Case("an end frame alone", put("x_end.png"), WAITING, "x.png")
    for name in ("x.gif", "x.svg", "x.exe", "x", "x.png.gpg", "x.mov", "x.json", "x.txt.zip"):
        yield Case(f"a file called {name}", put(name), WAITING, "is not of a known type")
    yield Case(
        "a photo of an iPhone alone", put("x.heic"), WAITING, "x.txt" if heif.available() else "this is HEIC"
    )
    unread = several(put("x.txt", b"pan left"), put("x.gif"))
    yield Case("a text and a picture that is not read", unread, WAITING, "x.gif is not of a known type")
    yield Case(
        "an end frame that is not read", several(pair(), put("x_end.gif")), WAITING, "x_end.gif is not of"
    )
    yield Case("a video alone", put("x.mp4"), WAITING, "more = 3.0 in x.toml, to make x.mp4 longer")
    longer = put("x.toml", b"more = 3\nprompt = 'a'\nmodel = 'f1'")
    for what, content in (
        ("nothing", b""),
        ("a picture", GOOD),
        ("a playlist", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"),
        ("a head of mp4", b"\0\0\0\x18ftypmp42" + bytes(100)),
    ):
        video = several(put("x.mp4", content), longer)
        yield Case(f"{what} called a video", video, FAILED, "x.mp4 cannot be read as mp4")
    chain = several(*(put(f"x_frame_{number}.png") for number in range(1000)), put("x.txt", b"pan left"))
    yield Case("a chain of 1000 frames", chain, FAILED, "a chain of 1000 frames, of which one may have 256")
    gap = several(*(put(f"x_frame_{number}.png") for number in (0, 2)), put("x.txt", b"pan left"))
    yield Case("a chain with a gap", gap, WAITING, "x_frame_1.png")
    both = several(pair(), *(put(f"x_frame_{number}.png") for number in (0, 1)))
    yield Case("a picture beside a chain", both, WAITING, "in each other's way")
    for file in ("/etc/hostname", "../swapped/x.png", ".x.png", "x.png/../y.png", "y.svg"):
        named_by = pair(toml=f'keyframes = {{"0" = "{file}"}}'.encode())
        yield Case(f"a keyframe called {file}", named_by, FAILED, "keyframes")
    linked = several(
        pair(toml=b'keyframes = {"0" = "y.png"}'),
        lambda path, out: (path / "y.png").symlink_to(out / "secret.png"),
    )
    yield Case("a keyframe that is a link", linked, WAITING, "y.png is not a regular file")
    texts = several(*(put(f"{number}.txt", b"pan left") for number in range(1000)))
    yield Case("1000 texts", texts, WAITING, ".png")
    folders = several(*(put(f"{number}/{number}/x.png") for number in range(200)))
    yield Case("200 folders", folders, WAITING, "x.txt")
    yield Case("a folder too deep", put("/".join(["d" * 60] * 20) + "/x.png"), WAITING, "lies too deep")
    yield Case("a folder called as a picture", several(put("x.png/y.png"), put("x.txt", b"a")), WAITING)
    for name in (".x.png", "x.png.part", "x.png~", "x.tmp", "desktop.ini", ".hidden/x.png", "@eaDir/x.png"):
        yield Case(f"{name} on its way", put(name), IGNORED)
    for name in ("#recycle/x.png", "$RECYCLE.BIN/x.png", "System Volume Information/x.png", "Icon\r"):
        yield Case(f"{name!a} of another system", put(name), IGNORED)
    forgotten = put(".framepackd-20260101-000000-abcdef-x\x1b[31m.png.part")
    yield Case("a hidden file of a job that is not known", forgotten, IGNORED)
    for mark in (
        " (conflicted copy 2026-11-28 101112)",
        ".sync-conflict-20261128-101112-ABCDEFG",
        " (Ann's conflicted copy 2026-11-28)",
    ):
        yield Case(
            f"a pair of conflict copies{mark}", named(f"x{mark}", b"pan left"), WAITING, "conflict copy"
        )
