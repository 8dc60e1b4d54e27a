"""The commands as a person runs them: what they print, how they end, how fast."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import Daemon, MakeDaemon, ending, environment, picture

FRAMEPACKD = [sys.executable, "-m", "framepackd"]
QUICK = [("--help",), ("status",), ("status", "--json"), ("show", "cat"), ("check", "--no-gpu")]

# What each imports anyhow. It takes half a second where a command takes 0.8; machines differ, and their load.
LIBRARIES = "import sqlalchemy.orm, pydantic_settings, rich.console"
TIMES_AS_LONG = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Have a daemon that has made a video, failed a job, and ended: for those who only look, together."""
    daemon = Daemon(tmp_path_factory.mktemp("finished"))
    daemon.drop("cat")
    daemon.drop("cow", model="framepack")
    assert daemon.command("run", "--once").returncode == 1
    with ending([daemon]):
        yield daemon


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FRAMEPACKD, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"XDG_STATE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)} | variables,
        cwd=folder,
    )


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_commands_that_only_look_do_not_load_torch(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys; from framepackd.cli.main import main\n"
        f"try: main({list(arguments)!r}, prog_name='framepackd')\n"
        "except SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'diffusers', 'transformers', 'av'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment() | {"XDG_STATE_HOME": str(tmp_path)},
    )
    assert answer.stdout.splitlines()[-1] == "heavy: []"


def test_commands_that_only_look_answer_at_once(finished: Daemon) -> None:
    """Processor time, for others may be at work here, and a command waits for next to nothing."""

    def best_of_two(*command: str) -> float:
        return min(timed(command), timed(command))

    def timed(command: tuple[str, ...]) -> float:
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=False, env=environment(), cwd=finished.root, stdout=subprocess.DEVNULL)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime

    limit = TIMES_AS_LONG * best_of_two(sys.executable, "-c", LIBRARIES)
    commands = [
        finished.arguments(*words) if words != ("--help",) else [*FRAMEPACKD, *words] for words in QUICK
    ]
    seconds = {" ".join(command): best_of_two(*command) for command in commands}
    assert max(seconds.values()) < limit, (limit, seconds)


def test_status_before_anything_was_run(tmp_path: Path) -> None:
    answer = run("status", folder=tmp_path)
    assert answer.returncode == 3
    assert "is not running" in answer.stdout
    assert json.loads(run("status", "--json", folder=tmp_path).stdout)["counts"]["queued"] == 0
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("settle_secs = 1\n", "unknown key 'settle_secs'"),
        ("settle_seconds = -1\n", "settle_seconds must be 0 to 3600, got -1"),
        ("settle_seconds = = 1\n", "config.toml"),
        ('model = "nope"\n', "model must be one of demo, demo-f1, f1, framepack, got 'nope'"),
        ("[defaults]\nstepz = 1\n", "unknown key 'stepz'"),
        ("[defaults]\nsteps = 1000\n", "steps must be 1 to 100, got 1000"),
        ("[gpu]\ndevcie = 'cpu'\n", "unknown key 'gpu.devcie'"),
        ("[models.mine]\nkind = 'f2'\ntransformer = 'x/y'\n", "models.mine.kind"),
    ],
)
def test_a_mistake_in_the_config_is_one_clear_line(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.toml").write_text(config)
    answer = run("status", "--config", str(tmp_path / "config.toml"), folder=tmp_path)
    assert answer.returncode == 2
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1, answer.stderr


def test_a_config_that_is_not_there_and_a_mistyped_variable_are_told(tmp_path: Path) -> None:
    answer = run("run", "--config", "nowhere.toml", folder=tmp_path)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "nowhere.toml does not exist" in answer.stderr
    answer = run("status", folder=tmp_path, FRAMEPACKD_INBOXX="/x")
    assert answer.returncode == 2
    assert "FRAMEPACKD_INBOXX" in answer.stderr


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    assert run("staus", folder=tmp_path).returncode == 2
    assert run("show", folder=tmp_path).returncode == 2


def test_show_finds_a_job_by_id_start_of_id_or_name(finished: Daemon) -> None:
    job = next(job["id"] for job in finished.status()["jobs"] if job["name"] == "cat")
    for wanted in (job, job[:-2], "cat"):
        record = json.loads(finished.command("show", wanted, "--json").stdout)
        assert (record["id"], record["state"], record["steps_run"]) == (job, "done", 4)
    stopped = finished.command("show", "cat").stdout
    assert "pan left" in stopped
    assert "delivered" in stopped
    for start in (lambda: None, finished.start):  # from the database, and from a running daemon
        start()
        assert finished.command("show", "cat").stdout == stopped
        missing = finished.command("show", "dog")
        assert missing.returncode == 1
        assert "no job 'dog'" in missing.stderr


def test_colours_are_off_when_piped(finished: Daemon) -> None:
    assert "\x1b" not in finished.command("status").stdout + finished.command("show", "cat").stdout


def test_check_says_what_is_wrong_and_how_to_mend_it(daemon: Daemon) -> None:
    fine = daemon.command("check", "--no-gpu")
    assert fine.returncode == 0, fine.stdout
    assert "✗" not in fine.stdout
    daemon.config.write_text(daemon.config.read_text().replace('"demo"', '"framepack"'))
    missing = daemon.command("check", "--no-gpu")
    assert missing.returncode == 1
    assert "framepackd models download framepack" in missing.stdout.replace("\n", " ")


def test_a_model_whose_files_are_not_here_fails_the_job_at_once_and_says_what_to_do(finished: Daemon) -> None:
    reason = (finished.failed / "cow.error.txt").read_text()
    assert "framepackd models download framepack" in reason
    assert json.loads(finished.command("show", "cow", "--json").stdout)["attempts"] == 0


@pytest.mark.long
def test_calibrating_writes_a_file_that_a_model_of_ones_own_can_use(make_daemon: MakeDaemon) -> None:
    from framepack_core.models.registry import BUILT_IN

    demo = BUILT_IN["demo"]
    models = f'[models.mine]\nkind = "framepack"\ntransformer = "{demo.transformer.folder}"\n'
    models += f'base = "{demo.base.folder}"\nimage_encoder = "{demo.image_encoder.folder}"\n'
    daemon = make_daemon(models=models)
    ratios = daemon.root / "mine.json"
    unknown = daemon.command("calibrate", "nobodys", "--output", str(ratios))
    assert unknown.returncode == 1
    assert "demo, demo-f1, f1, framepack, mine" in unknown.stderr
    measured = daemon.command("calibrate", "mine", "--output", str(ratios))
    assert measured.returncode == 0, measured.stderr
    assert len(json.loads(ratios.read_text())["ratios"]) == 2, "the config's steps"
    assert 'mag_ratios = "' in measured.stdout

    daemon.config.write_text(daemon.config.read_text() + 'mag_ratios = "mine.json"\n')
    daemon.drop("cat", model="mine", cache="magcache", steps=25)
    assert daemon.command("run", "--once").returncode == 0
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert record["cache"] == "magcache"
    assert record["model_sources"]["mag_ratios"] == str(ratios)


def test_the_demo_makes_a_video_prints_its_path_last_and_keeps_what_an_earlier_one_made(
    tmp_path: Path,
) -> None:
    picture(tmp_path / "mine_end.jpg")
    (tmp_path / "somewhere/state").mkdir(parents=True)
    (tmp_path / "somewhere/state/framepackd.db").touch()
    (tmp_path / "somewhere/outbox").mkdir()
    (tmp_path / "somewhere/outbox/lake.mp4").write_text("of an earlier demo")
    prompt = 'zoom in, as they say, "slowly"'
    own = ("--image", "mine_end.jpg", "--prompt", prompt, "--seconds", "1")
    answer = run("demo", "--folder", "somewhere", *own, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    video = tmp_path / "somewhere/outbox/mine_end.mp4"
    assert Path(answer.stdout.splitlines()[-1]) == video
    assert "demo --web" in answer.stdout
    assert list((tmp_path / "somewhere/outbox").glob("*.mp4")) == [video]
    assert json.loads(video.with_suffix(".json").read_text())["prompt"] == prompt
    assert (tmp_path / "somewhere/earlier/1/outbox/lake.mp4").read_text() == "of an earlier demo"


@pytest.mark.parametrize(
    ("name", "told"), [("none.png", "No such file"), ("here.tiff", "no picture of a known type: .png")]
)
def test_the_demo_says_what_is_wrong_with_a_picture(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "here.tiff").write_text("not looked at")
    answer = run("demo", "--image", name, folder=tmp_path)
    assert answer.returncode == 1
    assert told in answer.stderr
    assert not (tmp_path / "demo").exists()


def test_the_demo_clears_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "demo/outbox").mkdir(parents=True)
    (tmp_path / "demo/outbox/precious.mp4").write_text("mine")
    answer = run("demo", folder=tmp_path)
    assert answer.returncode == 1
    assert "not an earlier demo" in answer.stderr
    assert (tmp_path / "demo/outbox/precious.mp4").exists()
