"""Configuration: the example is the documentation, mistakes are named, paths mean what people expect."""

import re
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest

from framepack_core.models.registry import Source
from framepackd.settings import cluster
from framepackd.settings.cluster import ClusterConfig
from framepackd.settings.config import Config, ConfigError, load_config, poll_seconds
from framepackd.settings.job_settings import JobSettings, parse_settings
from framepackd.settings.tables import ModelConfig

EXAMPLE = Path(__file__).parents[3] / "config.example.toml"


@pytest.fixture(autouse=True)
def no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for variable in ("FRAMEPACKD_CONFIG", "STATE_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_the_example_is_the_defaults() -> None:
    example, defaults = load_config(EXAMPLE), load_config()
    for name in Config.model_fields:
        if name not in ("state_dir", "inbox", "outbox", "failed", "lora_dir", "defaults"):
            assert getattr(example, name) == getattr(defaults, name), name
    assert JobSettings(**example.defaults) == JobSettings()


def test_the_example_names_every_key() -> None:
    text = re.sub(r"^# (?=\[?\w+(\.\w+)?( =|\]))", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    keys = tomllib.loads(text)
    assert set(keys) == set(Config.model_fields)
    assert set(keys["gpu"]) == set(Config.model_fields["gpu"].annotation.model_fields)
    assert set(keys["cluster"]) == set(ClusterConfig.model_fields)
    assert set(keys["models"]["mine"]) == set(ModelConfig.model_fields)
    assert set(keys["defaults"]) == set(JobSettings.model_fields)


def test_the_environment_names_several_devices_and_a_time_as_the_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, '[gpu]\ndevice = ["cuda:0", "cuda:1"]\nmove_after = 7200\n')
    of_file = load_config(path).gpu
    assert (of_file.devices, of_file.move_after) == (("cuda:0", "cuda:1"), timedelta(hours=2))
    monkeypatch.setenv("FRAMEPACKD_GPU__DEVICE", '["cuda:0","cuda:1"]')
    for time in ("7200", "02:00:00"):
        monkeypatch.setenv("FRAMEPACKD_GPU__MOVE_AFTER", time)
        assert load_config(written(tmp_path, "")).gpu == of_file


def test_a_machine_without_a_card_can_be_the_front_of_others(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, '[gpu]\ndevice = []\n[cluster]\nnodes = ["render2", "render3:cpu"]\n')
    )
    assert config.gpu.devices == ()
    assert (config.cluster.hosts, config.cluster.cards) == (("render2", "render3"), ("render3:cpu",))
    wanted = [("render2", "cuda:7"), ("render3", "cpu"), ("render3", "cuda:0"), ("render4", "cpu")]
    assert [config.cluster.wants(*card) for card in wanted] == [True, True, False, False]


def test_the_files_of_a_cluster_lie_beside_the_configuration_or_among_the_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").mkdir()
    for name in ("token", "crt", "key", "ca"):
        (tmp_path / "credentials" / name).write_text("secret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    documented = 'token_file = "token"\ntls_cert = "crt"\ntls_key = "key"\ntls_ca = "ca"\n'
    found = load_config(written(tmp_path, f"[cluster]\n{documented}")).cluster
    files = (found.token_file, found.tls_cert, found.tls_key, found.tls_ca)
    assert files == tuple(tmp_path / "credentials" / name for name in ("token", "crt", "key", "ca"))
    tls = 'tls_cert = "a.crt"\ntls_key = "a.key"\ntls_ca = "/etc/ca.crt"\n'
    found = load_config(written(tmp_path, f'[cluster]\ntoken_file = "token"\n{tls}')).cluster
    assert found.token_file == tmp_path / "credentials/token"
    assert (found.tls_cert, found.tls_ca) == (tmp_path / "a.crt", Path("/etc/ca.crt"))


def test_the_socket_is_the_machine_s_or_where_its_unit_has_none_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RUN", tmp_path / "run")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    of_machine = tmp_path / "run/framepackd-node/bridges.sock"
    assert ClusterConfig().socket_path == of_machine
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert ClusterConfig().socket_path == Path("/run/user/7/framepackd-node/bridges.sock")
    of_machine.parent.mkdir(parents=True)
    assert ClusterConfig().socket_path == of_machine


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, 'settle_seconds = 2\n[gpu]\ndevice = "cuda:0"\ndtype = "float32"\n')
    monkeypatch.setenv("FRAMEPACKD_SETTLE_SECONDS", "3")
    monkeypatch.setenv("FRAMEPACKD_GPU__DEVICE", "cpu")
    monkeypatch.setenv("FRAMEPACKD_DEFAULTS__STEPS", "7")
    config = load_config(path)
    assert (config.settle_seconds, config.gpu.device, config.gpu.dtype) == (3, "cpu", "float32")
    assert config.defaults == {"steps": 7}


def test_the_config_is_found_where_the_contract_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "xdg/framepackd/config.toml"
    own.parent.mkdir(parents=True)
    own.write_text("max_attempts = 4\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert load_config().max_attempts == 4
    monkeypatch.setenv("FRAMEPACKD_CONFIG", str(written(tmp_path, "max_attempts = 5\n")))
    assert load_config().max_attempts == 5


def test_folders_lie_in_the_state_folder_unless_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config().inbox == tmp_path / "framepackd/inbox"
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/a:{tmp_path}/b")
    assert load_config().outbox == tmp_path / "a/outbox"
    config = load_config(written(tmp_path, 'state_dir = "state"\ninbox = "in"\n'))
    assert (config.state_dir, config.inbox) == (tmp_path / "state", tmp_path / "in")
    assert config.failed == tmp_path / "state/failed"


def test_an_outbox_in_the_inbox_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in the inbox"):
        load_config(written(tmp_path, 'inbox = "in"\noutbox = "in/out"\n'))


def test_an_outbox_in_the_inbox_by_another_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    for outbox in ("a/../in/out", "link/out"):
        with pytest.raises(ConfigError, match="lies in the inbox"):
            load_config(written(tmp_path, f'inbox = "in"\noutbox = "{outbox}"\n'))


def test_a_folder_of_a_model_is_relative_to_the_config(tmp_path: Path) -> None:
    (tmp_path / "my/weights").mkdir(parents=True)
    path = written(tmp_path, '[models.mine]\nkind = "f1"\ntransformer = "my/weights"\n')
    assert load_config(path).spec("mine").transformer.folder == tmp_path / "my/weights"


def test_an_unknown_model_is_reported_with_the_key_that_names_it(tmp_path: Path) -> None:
    told = r"defaults\.model must be one of demo, demo-f1, f1, framepack, got 'zzz'"
    with pytest.raises(ConfigError, match=told):
        load_config(written(tmp_path, '[defaults]\nmodel = "zzz"\n'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[defaults]\nsteps = 400\n", "[defaults]: steps must be 1 to 100, got 400"),
        ("[defaults]\nstepz = 1\n", "[defaults]: unknown key 'stepz': did you mean 'steps'?"),
        ("steps = 3\n", "unknown key 'steps': did you mean 'defaults.steps'?"),
        ("inboxx = 'a'\n", "unknown key 'inboxx': did you mean 'inbox'?"),
        ("[gpu]\ndevize = 'cpu'\n", "unknown key 'gpu.devize': did you mean 'gpu.device'?"),
        (
            "[models.base]\nkind = 'f1'\ntransformr = 'a'\n",  # called as one of its keys
            "models.base.transformer is missing; "
            "unknown key 'models.base.transformr': did you mean 'models.base.transformer'?",
        ),
        (
            "model = 'framepak'\n",
            "model must be one of demo, demo-f1, f1, framepack, got 'framepak': did you mean 'framepack'?",
        ),
        ("[gpu]\ncompile = 'x'\n", "gpu.compile must be 'auto' or true or false, got 'x'"),
        *(
            (
                f"[gpu]\ndevice = {device}\n",
                'gpu.device must be "auto", "cpu", "all", a card such as "cuda:0", or a list such as '
                f"""["cuda:0", "cuda:1"], got {device.replace('"', "'")}""",
            )
            for device in ('"cuda:0,cuda:1"', '"gpu"', '""', "0")
        ),
        (
            '[gpu]\ndevice = ["cpu", 1]\n',
            'gpu.device in a list must be "cpu" or a card such as "cuda:0", got 1',
        ),
        *(
            (
                f"[gpu]\nmove_after = {time}\n",
                f"""gpu.move_after must be seconds, more than 0, or "HH:MM:SS", got {shown}""",
            )
            for time, shown in (
                ("true", "True"),
                ("0", "0"),
                ("-5", "-5"),
                ("inf", "inf"),
                ("'1:2'", "'1:2'"),
            )
        ),
        ("[gpu]\nidle_unload_seconds = -3\n", "gpu.idle_unload_seconds must be 0 to 31536000, got -3"),
        ("poll_seconds = 0\n", "poll_seconds must be more than 0, and at most 86400, got 0"),
        ("gpu = 3\n", "gpu must be a table, got 3"),
        (
            "[web]\nhosts = ['a b']\n",
            "web.hosts must be names such as \"films.example\", perhaps with a port, got 'a b'",
        ),
        (
            "[gpu]\ndevice = []\n",
            'gpu.device must name at least one device, such as ["cuda:0", "cuda:1"], unless nodes under '
            "[cluster] names other machines, got []",
        ),
        (
            "[cluster]\nnodes = 'render2'\n",
            'cluster.nodes must be "all", or a list of machines and cards such as ["render2", '
            "\"render3:cuda:0\"], got 'render2'",
        ),
        (
            "[cluster]\nnodes = ['render2:gpu']\n",
            'cluster.nodes must be a machine such as "render2" or one of its cards such as "render2:cuda:0", '
            "got 'render2:gpu'",
        ),
        (
            "[cluster]\nnodes = ['render2', 'render2']\n",
            "cluster.nodes must name each once, got 'render2' twice",
        ),
        (
            "[cluster]\naddress = 'front'\n",
            "cluster.address must be a machine and a port such as \"front:6379\", got 'front'",
        ),
        (
            "[cluster]\ntls_key = 'node.key'\n",
            "cluster: TLS needs tls_cert, tls_key, tls_ca: set tls_cert and tls_ca too",
        ),
        (
            "[web]\npassword = 'x'\npassword_file = 'y'\n",
            "web: password and password_file are both set: leave one of them out",
        ),
    ],
)
def test_a_mistake_is_reported_once_with_its_value_and_a_guess(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as told:
        load_config(path)
    assert str(told.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("FRAMEPACKD_SETTLE_SECONDS", "settle_seconds must be a number from 0 to 3600, got 'x'"),
        ("FRAMEPACKD_GPU__DEVIZE", "unknown key 'gpu.devize': did you mean 'gpu.device'?"),
        ("FRAMEPACKD_MODLE", "did you mean FRAMEPACKD_MODEL?"),
        ("FRAMEPACKD_GPU_DEVICE", "did you mean FRAMEPACKD_GPU__DEVICE?"),
        ("FRAMEPACKD_STEPS", "did you mean FRAMEPACKD_DEFAULTS__STEPS?"),
        ("FRAMEPACKD_ZZZ", "correct it or unset it"),
    ],
)
def test_a_mistake_in_the_environment_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    path = written(tmp_path, "settle_seconds = 1\n[gpu]\ndevice = 'cpu'\n")
    monkeypatch.setenv(variable, "x")
    with pytest.raises(ConfigError) as told:
        load_config(path)
    assert str(told.value).startswith("environment")
    assert variable in str(told.value)
    assert str(told.value).endswith(said)
    assert load_config_without(variable, path, monkeypatch).settle_seconds == 1, "nothing is left of it"


def load_config_without(variable: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv(variable)
    return load_config(path)


def test_if_both_are_wrong_the_file_is_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "max_attempts = 0\n")
    monkeypatch.setenv("FRAMEPACKD_SETTLE_SECONDS", "x")
    with pytest.raises(ConfigError) as told:
        load_config(path)
    assert str(told.value) == f"{path}: max_attempts must be 1 to 100, got 0"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_configuration_in_another_encoding_is_refused_with_its_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes("model = 'demo'\n".encode(encoding))
    with pytest.raises(ConfigError, match=f"is {encoding[:6].upper()}: save it as UTF-8"):
        load_config(path)


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes("model = 'demo'\n".encode("utf-8-sig"))
    assert load_config(path).model == "demo"


def test_an_unknown_home_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="home directory"):
        load_config(written(tmp_path, 'inbox = "~nosuchuser/in"\n'))


def test_switches_come_as_text_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMEPACKD_DEFAULTS__USE_TEACACHE", "true")
    assert load_config().defaults == {"cache": "teacache"}


def test_a_users_model_names_its_repositories(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    config = load_config(
        written(
            tmp_path,
            '[models.mine]\nkind = "f1"\ntransformer = "me/mine"\nrevision = "v1"\n'
            f'base = "{tmp_path}/weights"\nimage_encoder = "me/eyes@abc"\n',
        )
    )
    spec = config.spec("mine")
    assert str(spec.transformer) == "me/mine@v1"
    assert spec.base.is_local
    assert str(spec.image_encoder) == "me/eyes@abc"
    assert config.spec("framepack").kind == "framepack"


def test_a_file_of_weights_is_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    """Of one that was not there it was said that the hub has it not, and to download it."""
    config = load_config(
        written(tmp_path, '[models.mine]\nkind = "f1"\ntransformer = "weights/F1_fp8.safetensors"\n')
    )
    source = config.spec("mine").transformer
    assert source.is_local
    assert source.folder == tmp_path / "weights/F1_fp8.safetensors"
    (tmp_path / "weights").mkdir()
    source.folder.touch()
    assert source.is_local


def test_only_a_folder_of_the_hub_keeps_its_revision(
    tmp_path: Path,
) -> None:
    for folder in ("models--me--mine/snapshots/abc", "models--me--mine/snapshots/def", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    text = '[models.mine]\nkind = "f1"\nrevision = "abc"\ntransformer = "{}"\n'
    hub = load_config(written(tmp_path, text.format("models--me--mine"))).spec("mine").transformer
    assert hub.folder == tmp_path / "models--me--mine/snapshots/abc"
    plain = load_config(written(tmp_path, text.format("plain"))).spec("mine").transformer
    assert plain == Source(str(tmp_path / "plain"))


def test_scans_are_more_frequent_where_events_cannot_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    for filesystem, expected in (("ext4", 60), ("nfs4", 10), ("fuse.sshfs", 10), ("cifs", 10)):
        monkeypatch.setattr("framepackd.files.filesystem_type", lambda _, found=filesystem: found)
        assert poll_seconds(config) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"total_second_length": 2, "cfg": 2, "gs": 3, "rs": 0.5}, None),
        ({"use_teacache": True}, {"cache": "teacache"}),
        ({"use_teacache": False}, {"cache": "none"}),
        ({"use_random_seed": True, "seed": 5}, {"seed": None}),
        ({"seed": 5, "use_random_seed": True}, {"seed": None}),
        ({"seed": 5, "use_random_seed": False}, {"seed": 5}),
        ({"seed": "random"}, {"seed": None}),
        ({"mp4_crf": 20, "n_prompt": "blurry"}, {"crf": 20, "negative_prompt": "blurry"}),
        ({"gpu_memory_preservation": 6}, {"gpu_memory_preservation": 6}),
    ],
)
def test_names_of_the_published_scripts_are_understood(
    given: dict[str, object], expected: dict[str, object] | None
) -> None:
    expected = expected or {"seconds": 2, "true_cfg_scale": 2, "guidance_scale": 3, "guidance_rescale": 0.5}
    assert parse_settings(given, "x.toml") == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mp4_crf": 100}, "x.toml: mp4_crf must be 0 to 51, got 100"),
        ({"cfg": 2, "true_cfg_scale": 3}, "x.toml: true_cfg_scale and cfg set the same"),
        ({"use_teacache": "maybe"}, "x.toml: use_teacache must be true or false, got 'maybe'"),
        ({"seed": -1}, 'x.toml: seed must be a whole number from 0 to 4294967295, or "random", got -1'),
        ({"seed": "rnd"}, "seed must be a whole number from 0 to 4294967295, or \"random\", got 'rnd'"),
        ({"total_second_lenght": 3}, "'total_second_lenght': did you mean 'total_second_length'?"),
        ({"loras": [{"file": "a.safetensors", "wieght": 1}]}, "did you mean 'loras.0.weight'?"),
    ],
)
def test_mistakes_are_reported_under_the_name_that_was_used(given: dict[str, object], said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)):
        parse_settings(given, "x.toml")


def test_a_random_seed_is_drawn_once() -> None:
    drawn = JobSettings(seed="random").with_drawn_seed()
    assert 0 <= (drawn.seed or 0) < 2**32
    assert drawn.with_drawn_seed() is drawn
