"""A job travels to another machine and is the same there, but for where its files lie."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framepack_core.request import Lora, Request, TimedPrompt
from framepackd.cluster.located import LocatedError, from_json, to_json
from framepackd.cluster.node_file import NodeFile
from framepackd.worker.messages import Work
from framepackd.worker.source_video import Continued
from tests.conftest import tiny_spec
from tests.daemon.worker.jobs import work_of

FRONT, NODE, LORAS = Path("/front/jobs/one"), Path("/node/jobs/one"), Path("/node/loras")
SHA = "ab" * 32
OWN = NodeFile({"framepack-i2v": tiny_spec()}, Path("/node"), Path("/node-cache"), Path("/node/tiny.pth"))
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1).filter(
    lambda name: name not in (".", "..")
)
INPUTS = NAMES.map(lambda name: FRONT / "inputs" / name)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


@st.composite
def requests(draw: Any) -> Request:
    texts = draw(st.lists(TEXTS.filter(str.strip), max_size=2))
    return Request(
        image=draw(INPUTS),
        prompt=draw(TEXTS),
        seed=draw(st.integers(0, 2**32 - 1)),
        end_image=draw(st.none() | INPUTS),
        keyframes=draw(st.dictionaries(st.integers(0, 9), INPUTS, max_size=2)),
        continue_from=draw(st.none() | st.just(FRONT / "continued" / "tail.mp4")),
        loras=draw(st.sampled_from([(), (Lora(file=Path("/loras/a.safetensors"), weight=0.3),)])),
        prompts=tuple(TimedPrompt(start=n, end=n + 0.7, text=text) for n, text in enumerate(texts)),
        true_cfg_scale=draw(st.floats(1, 32)),
        cache=draw(st.sampled_from(["none", "teacache", "magcache"])),
    )


WORKS = st.builds(
    Work,
    job_id=st.just("20260101-000000-abcdef"),
    request=requests(),
    following=st.lists(requests(), max_size=2).map(tuple),
    spec=st.just(tiny_spec()),
    result=st.just(FRONT / "result"),
    checkpoint=st.just(FRONT / "checkpoint"),
    preview=st.just(FRONT / "preview.mp4"),
    compile_cache=st.just(Path("/front/cache")),
    load_lock=st.just(Path("/front/load.lock")),
    fingerprint=TEXTS,
    device=st.just("render2:cuda:0"),
    dtype=st.just("auto"),
    attention=st.just("auto"),
    levels=st.dictionaries(TEXTS, st.integers(0, 9), max_size=2),
    uncompiled=st.dictionaries(TEXTS, TEXTS, max_size=2),
    tags=st.dictionaries(TEXTS, TEXTS, max_size=2),
    elsewhere=st.frozensets(TEXTS, max_size=2),
    preview_decoder=st.none() | st.just(Path("/front/tiny.pth")),
    continued=st.none()
    | st.builds(
        Continued,
        video=INPUTS.map(str),
        folder=st.just(str(FRONT / "continued")),
        latents=st.none() | st.integers(1, 9),
    ),
)


def there(path: Path) -> Path:
    return NODE / path.relative_to(FRONT)


def expected_request(request: Request) -> Request:
    return request.model_copy(
        update={
            "image": there(request.image),
            "end_image": request.end_image and there(request.end_image),
            "continue_from": request.continue_from and there(request.continue_from),
            "keyframes": {section: there(file) for section, file in request.keyframes.items()},
            "loras": tuple(
                lora.model_copy(update={"file": LORAS / SHA / lora.file.name}) for lora in request.loras
            ),
        }
    )


@given(WORKS)
def test_a_job_arrives_as_it_was_sent_but_for_its_places(work: Work) -> None:
    sha256s = {lora.file: SHA for request in work.clips for lora in request.loras}
    arrived = from_json(to_json(work, "cuda:0", sha256s), NODE, LORAS, OWN)
    continued = work.continued and replace(
        work.continued,
        video=str(there(Path(work.continued.video))),
        folder=str(there(Path(work.continued.folder))),
    )
    assert arrived == replace(
        work,
        request=expected_request(work.request),
        following=tuple(map(expected_request, work.following)),
        result=NODE / "result",
        checkpoint=NODE / "checkpoint",
        preview=NODE / "preview.mp4",
        compile_cache=Path("/node-cache/compiled"),
        load_lock=Path("/node-cache/load.lock"),
        preview_decoder=OWN.preview_decoder,
        continued=continued,
        device="cuda:0",
        mirrored=True,
    )


@given(WORKS)
def test_no_path_of_the_front_travels(work: Work) -> None:
    sha256s = {lora.file: SHA for request in work.clips for lora in request.loras}
    assert b'"/front' not in to_json(work, "cpu", sha256s)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "inputs/../../x"])
def test_a_path_that_leads_out_of_the_folder_is_refused(path: str) -> None:
    content = _described().replace(b'"inputs/cat.png"', f'"{path}"'.encode())
    with pytest.raises(LocatedError, match="outside"):
        from_json(content, NODE, LORAS, OWN)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(LocatedError, match="framepack-i2v"):
        from_json(_described(), NODE, LORAS, replace(OWN, models={}))


def test_a_file_elsewhere_keeps_a_job_here() -> None:
    with pytest.raises(LocatedError, match="is not in"):
        _described(Path("/home/cat.png"))


def _described(image: Path = FRONT / "inputs" / "cat.png") -> bytes:
    return to_json(work_of(Request(image=image, prompt="a cat"), FRONT), "cpu", {})
