"""Workers in threads of the test: they neither die with it nor ignore its signals."""

from collections.abc import Iterator

import pytest

from framepackd import files
from framepackd.worker import main


@pytest.fixture(autouse=True)
def _a_worker_may_be_a_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(main, "die_with", lambda parent: None)
    for name in ("signal", "pthread_sigmask"):
        monkeypatch.setattr(main.signal, name, lambda *_: None)
    yield
    files.observe(None)
