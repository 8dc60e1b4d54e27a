"""The loaded model: one worker at a time loads one."""

import fcntl
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from framepack_core.models import contents
from framepackd.worker import engines
from tests.daemon.worker.jobs import work_in


def test_a_worker_waits_while_another_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that plan at once would both count the same free memory of the machine."""
    work, loaded = work_in(tmp_path), threading.Event()
    engine = SimpleNamespace(
        level=0, device=None, models=SimpleNamespace(dtype=None), take_level=lambda _: None
    )

    def load(*_: object, **__: object) -> object:
        loaded.set()
        return engine

    monkeypatch.setattr(engines.Engine, "load", load)
    monkeypatch.setattr(engines.device_support, "warnings", lambda *_: [])
    with work.load_lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=engines.Engines().get, args=(work, 0))
        thread.start()
        assert not loaded.wait(0.2)
    assert loaded.wait(5)
    thread.join()


def test_a_loaded_model_keeps_the_name_of_the_files_that_it_was_loaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are replaced meanwhile are not those that compute; and to read them takes a while."""
    names = iter(("first", "first", "second"))
    monkeypatch.setattr(contents, "digest", lambda _: next(names))
    kept, work = engines.Engines(), work_in(tmp_path)
    assert kept.model_digest(work) == "first"
    kept.get(work, 0)
    assert kept.model_digest(work) == "first"
    assert kept.model_digest(replace(work, dtype="float32")) == "second", "it is loaded anew"
