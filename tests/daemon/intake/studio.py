"""Makes videos and drops them again, to be extended."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from framepack_core.media import video_reader
from framepackd.delivery import deliver as delivery
from framepackd.inbox.scan import Inbox
from framepackd.intake import take as intake
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config, load_config
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker.engines import Engines
from framepackd.worker.main import answer
from framepackd.worker.messages import Finished, Message
from tests.daemon.worker.jobs import Ears
from tests.golden import TINY_MODELS

ENGINES = Engines()
SMALL = "steps = 2\nlatent_window_size = 3\nwidth = 48\nheight = 32\nkeep_latents = true\n"
SECTION = 0.4  # seconds


class Studio:
    """Folders, and jobs that are made at once."""

    def __init__(self, root: Path, model: str = "forward") -> None:
        root.mkdir(exist_ok=True)
        base = f'base = "{TINY_MODELS}/hunyuanvideo"\nimage_encoder = "{TINY_MODELS}/flux_redux"\n'
        models = "".join(
            f'[models.{name}]\nkind = "{kind}"\ntransformer = "{TINY_MODELS}/{folder}"\n{base}'
            for name, kind, folder in (
                ("forward", "f1", "framepack-f1"),
                ("backward", "framepack", "framepack-i2v"),
            )
        )
        text = f'state_dir = "state"\nmodel = "{model}"\nsettle_seconds = 0\nresults_page = false\n'
        text += '[gpu]\ndevice = "cpu"\n'
        (root / "config.toml").write_text(f"{text}[defaults]\n{SMALL}{models}")
        self.config: Config = load_config(root / "config.toml")
        for folder in (*self.config.folders.values(), self.config.jobs_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self.store = JobStore(self.config.database)
        self.inbox, self.outbox = self.config.inbox, self.config.outbox

    def picture(self, name: str = "cat", prompt: str = "a cat", **settings: Any) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.inbox / f"{name}.png")
        (self.inbox / f"{name}.txt").write_text(prompt)
        self.settings(name, **settings)

    def settings(self, name: str = "cat", **settings: Any) -> None:
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        (self.inbox / f"{name}.toml").write_text("".join(lines))

    def waiting(self) -> dict[str, str]:
        return {waits.name: waits.missing for waits in Inbox(self.inbox, 0).scan().waiting}

    def take(self) -> Job:
        (group,) = Inbox(self.inbox, 0).scan().ready
        (job,) = intake.take(group, self.config, self.store)
        return job

    def refusal(self) -> str:
        delivery = self.take().delivery
        assert delivery is not None
        return str(delivery["error"])

    def make(self) -> tuple[Job, Message]:
        """Take what is in the inbox in, generate and deliver it."""
        job = self.take()
        assert job.delivery is None, job.delivery
        return job, self.end(job)

    def end(self, job: Job) -> Message:
        """Generate and deliver."""
        self.store.claim()
        supervisor, ears = Supervisor(self.config, self.store), Ears()
        reply = answer(supervisor.work_of(job), ENGINES, ears.theirs)
        if isinstance(reply, Finished):
            supervisor.decide_done(job, reply)
        else:
            self.store.decide(job.id, State.FAILED, error=getattr(reply, "error", None))
        delivery.deliver(self.store.get(job.id), self.config, self.store)
        return reply

    def bring_back(self, *names: str) -> None:
        """Move files from the outbox to the inbox."""
        for name in names:
            shutil.move(self.outbox / name, self.inbox / name)


def film(path: Path, count: int = 40, size: tuple[int, int] = (64, 96), rate: int = 30) -> np.ndarray:
    """Write a video as somebody else might, in MPEG-4, and give its frames as they are read."""
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            picture = np.full((*size, 3), (30, 60, 90), np.uint8)
            picture[:, : 3 + 2 * number] = (200, 5 * number % 255, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return frames(path)


def frames(path: Path) -> np.ndarray:
    return np.stack(list(video_reader.pictures(path)))
