"""Loads the configuration: a TOML file, over it environment variables ``FRAMEPACKD_...``."""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from framepack_core.errors import RequestError
from framepack_core.mistakes import closest, explain, shown
from framepack_core.models.registry import BUILT_IN, ModelSpec
from framepackd import files
from framepackd.problems import CommandError
from framepackd.settings.cluster import ClusterConfig
from framepackd.settings.decoding import as_text
from framepackd.settings.job_settings import OTHER_NAMES, JobSettings, parse_settings, refuse_shared
from framepackd.settings.secret_files import locate
from framepackd.settings.tables import DraftConfig, GpuConfig, ModelConfig, NotifyConfig, WebConfig

ENV_PREFIX = "FRAMEPACKD_"
CONFIG_VARIABLE = "FRAMEPACKD_CONFIG"
OF_THE_MACHINE = Path("/etc/framepackd/config.toml")  # read if the user has none
# framepackd notify sets these for its command, which may run framepackd in turn: they are no keys.
EVENT_VARIABLES = tuple(f"FRAMEPACKD_{name}" for name in ("EVENT", "JOB", "NAME", "OUTPUT", "ERROR"))
# On these a write of another machine sends no event.
UNWATCHED_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "virtiofs", "vboxsf", "ceph")


class ConfigError(CommandError):
    """The configuration cannot be read; the text says where and why."""

    exit_code = 2


class Config(BaseSettings):
    """Every key with its default; ``config.example.toml`` explains them."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    state_dir: Path = Field(default_factory=lambda: _default_state_dir())
    inbox: Path = Path("inbox")  # this and the next three lie in the state folder unless set
    outbox: Path = Path("outbox")
    failed: Path = Path("failed")
    lora_dir: Path = Path("loras")
    settle_seconds: float = Field(5.0, ge=0, le=3600)
    poll_seconds: float | None = Field(None, gt=0, le=86400)  # None: 60, or 10 where events cannot be trusted
    model: str = "framepack"
    max_attempts: int = Field(3, ge=1, le=100)
    on_duplicate: Literal["run", "skip"] = "run"
    hang_seconds: float = Field(120.0, gt=0, le=86400)  # without a word from the worker
    results_page: bool = True
    preview_decoder: Path | None = None  # weights of TAEHV
    models: dict[str, ModelConfig] = {}
    gpu: GpuConfig = GpuConfig()
    cluster: ClusterConfig = ClusterConfig()
    draft: DraftConfig = DraftConfig()
    web: WebConfig = WebConfig()
    notify: NotifyConfig = NotifyConfig()
    metrics_file: Path | None = None
    defaults: dict[str, Any] = {}
    _file: Path | None = PrivateAttr(None)

    @field_validator("defaults")
    @classmethod
    def _check_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            parsed = parse_settings(values, "[defaults]")
            refuse_shared(parsed, "[defaults]")
        except RequestError as error:
            raise ValueError(str(error)) from error
        return parsed

    @model_validator(mode="after")
    def _check_model(self) -> "Config":
        for key, name in (("model", self.model), ("defaults.model", self.defaults.get("model", self.model))):
            if name not in self.model_names():
                raise ValueError(self.unknown_model(name, key))
        return self

    @model_validator(mode="after")
    def _check_devices(self) -> "Config":
        if not self.gpu.devices and not self.cluster.nodes:
            raise ValueError(
                'gpu.device must name at least one device, such as ["cuda:0", "cuda:1"], unless nodes under '
                "[cluster] names other machines, got []"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment over the TOML file, and nothing else."""
        environment = (named["env_settings"],) if _reading.environment else ()
        return (
            named["init_settings"],
            *environment,
            InitSettingsSource(settings_cls, init_kwargs=_reading.file),
        )

    def model_names(self) -> list[str]:
        """Name the models that jobs may ask for."""
        return sorted({*BUILT_IN, *self.models})

    def unknown_model(self, name: str, key: str = "model") -> str:
        """Say that there is no model of this name, and which there are."""
        names = self.model_names()
        guess = closest(name, names)
        meant = "" if guess is None else f": did you mean {guess!r}?"
        return f"{key} must be one of {', '.join(names)}, got {shown(name)}{meant}"

    def specs(self) -> list[ModelSpec]:
        """Give every model that jobs may ask for."""
        return [self.spec(name) for name in self.model_names()]

    def model_kinds(self) -> dict[str, str]:
        """Say of each model whether it is a framepack, which works from the end, or an f1."""
        built_in = {name: str(spec.kind) for name, spec in BUILT_IN.items()}
        return built_in | {name: str(model.kind) for name, model in self.models.items()}

    def spec(self, name: str) -> ModelSpec:
        """Give a model by name; one in the config replaces a built-in one of the same name.

        Raises:
            KeyError: there is none.
        """
        return self.models[name].spec(name) if name in self.models else BUILT_IN[name]

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state_dir / "framepackd.db"

    @property
    def jobs_dir(self) -> Path:
        """The folder of the work folders, one for each job."""
        return self.state_dir / "jobs"

    @property
    def cache_dir(self) -> Path:
        """The folder of caches that can be rebuilt; some of them hold code."""
        if os.environ.get("CACHE_DIRECTORY"):  # set by systemd
            return Path(os.environ["CACHE_DIRECTORY"].split(":")[0])
        try:
            return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "framepackd"
        except RuntimeError:  # a user without a home
            return self.state_dir / "cache"

    @property
    def file(self) -> Path | None:
        """The file that it was read from."""
        return self._file

    @property
    def made_folders(self) -> list[Path]:
        """The folders that the daemon makes for itself if they are missing; see also folders.py."""
        own = [self.lora_dir] if self.lora_dir.is_relative_to(self.state_dir) else []  # another is only read
        return [self.state_dir, self.jobs_dir, *own]

    @property
    def trash(self) -> Path:
        """Where the page moves results that nobody wants."""
        return self.outbox.with_name(f"{self.outbox.name}-trash")

    @property
    def folders(self) -> dict[str, Path]:
        """All folders that have to exist."""
        return {name: getattr(self, name) for name in ("state_dir", "inbox", "outbox", "failed")}


SECRET_KEYS = (("web", "password"), ("notify", "webhook"))
FIXED_KEYS = ("state_dir", "inbox", "outbox", "failed", "gpu", "cluster")  # only a restart changes these


def changed(running: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """Merge a new configuration into that of a running daemon.

    Gives the merged one, the keys that change, and those that differ but need a restart.
    """
    differing = [key for key in Config.model_fields if getattr(new, key) != getattr(running, key)]
    fixed = [key for key in differing if key in FIXED_KEYS]
    taken = new.model_copy(update={key: getattr(running, key) for key in fixed})
    return taken, [key for key in differing if key not in fixed], fixed


@dataclass
class _Reading:
    """The sources of the next Config: pydantic-settings asks for them in a class method."""

    file: dict[str, Any] = field(default_factory=dict)
    environment: bool = True


_reading = _Reading()


def load_config(path: Path | None = None) -> Config:
    """Find and read the configuration.

    Without ``path``: $FRAMEPACKD_CONFIG, else $XDG_CONFIG_HOME/framepackd/config.toml if it exists, else
    /etc/framepackd/config.toml if it exists, else the defaults.

    Raises:
        ConfigError: it is not there, not TOML, or holds a mistake.
    """
    try:
        found = path or _find_config()
        if found is not None and not found.is_file():
            raise ConfigError(
                f"config {found} does not exist: correct the path, or leave it out for the defaults"
            )
    except (OSError, RuntimeError) as error:  # no right to look there; no home folder
        raise ConfigError(f"config {path or ''}: {error}") from error
    _refuse_unknown_variables()
    _reading.file = _read_toml(found) if found else {}
    try:
        config = _with_absolute_paths(Config(), (found.parent if found else Path.cwd()).absolute())
    except ValidationError as error:
        raise ConfigError(_explain(error, found)) from None  # which would hold secrets
    except (SettingsError, OSError, RuntimeError, ValueError) as error:  # a variable that is no JSON; no home
        raise ConfigError(f"{found or 'environment'}: {error}") from error
    finally:
        _reading.file = {}
    config._file = found
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(as_text(path.read_bytes(), str(path)))
    except RequestError as error:  # not UTF-8
        raise ConfigError(str(error)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _explain(error: ValidationError, file: Path | None) -> str:
    """Say what is wrong and where: in the file or, if the file alone is fine, in the environment."""
    variables = sorted(name for name in os.environ if _key_of(name) in Config.model_fields)
    where = f"environment ({', '.join(variables)})"
    if file is not None:
        _reading.environment = False
        try:
            Config()
        except ValidationError as own:
            error, where = own, str(file)
        finally:
            _reading.environment = True
    secret = ("web", "notify", *(".".join(key) for key in SECRET_KEYS))
    return f"{where}: {explain(error, Config, meant=_meant_in_config(), secret=secret)}"


def _meant_in_config() -> dict[str, str]:
    """Map keys that people write on the top level by mistake to the place where they belong."""
    tables: dict[str, type[BaseModel]] = {
        "gpu": GpuConfig,
        "cluster": ClusterConfig,
        "draft": DraftConfig,
        "web": WebConfig,
        "notify": NotifyConfig,
    }
    nested = {key: f"{name}.{key}" for name, table in tables.items() for key in table.model_fields}
    return nested | {key: f"defaults.{key}" for key in (*JobSettings.model_fields, *OTHER_NAMES)}


def _find_config() -> Path | None:
    if os.environ.get(CONFIG_VARIABLE):
        return own_config()
    return next((path for path in (own_config(), OF_THE_MACHINE) if path.is_file()), None)


def own_config() -> Path:
    """Give the path at which this user's configuration is looked for first."""
    if os.environ.get(CONFIG_VARIABLE):
        return Path(os.environ[CONFIG_VARIABLE])
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "framepackd/config.toml"


def _default_state_dir() -> Path:
    if os.environ.get("STATE_DIRECTORY"):
        return Path(os.environ["STATE_DIRECTORY"].split(":")[0])
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "framepackd"


def _refuse_unknown_variables() -> None:
    """Refuse a mistyped variable: pydantic-settings ignores unknown ones at the top level."""
    for variable in os.environ:
        key = _key_of(variable)
        if key is None or key in Config.model_fields or variable in (CONFIG_VARIABLE, *EVENT_VARIABLES):
            continue
        # FRAMEPACKD_GPU_DEVICE is as likely as FRAMEPACKD_DEVICE.
        nested = _meant_in_config()
        known = nested | {where.replace(".", "_"): where for where in nested.values()}
        known |= {name: name for name in Config.model_fields}
        guess = closest(key, known)
        meant = "" if guess is None else ENV_PREFIX + known[guess].replace(".", "__").upper()
        remedy = f"did you mean {meant}?" if meant else "correct it or unset it"
        raise ConfigError(f"environment: unknown key {key!r} ({variable}): {remedy}")


def _key_of(variable: str) -> str | None:
    """Give the top-level key that a variable of ours sets, or would set; None for other variables."""
    name = variable.upper()
    return name.removeprefix(ENV_PREFIX).split("__")[0].lower() if name.startswith(ENV_PREFIX) else None


def _with_absolute_paths(config: Config, base: Path) -> Config:
    """Resolve paths against the config's folder, and those that are not set against the state folder."""
    state_dir = base / config.state_dir.expanduser()
    others = {
        name: (base if name in config.model_fields_set else state_dir) / getattr(config, name).expanduser()
        for name in ("inbox", "outbox", "failed", "lora_dir")
    }
    optional = {
        name: base / file.expanduser()
        for name in ("metrics_file", "preview_decoder")
        if (file := getattr(config, name)) is not None
    }
    models = {name: model.with_absolute_paths(base) for name, model in config.models.items()}
    absolute = config.model_copy(
        update={
            **others,
            **optional,
            **_secret_files(config, base),
            "state_dir": state_dir,
            "models": models,
            "cluster": config.cluster.with_absolute_paths(base),
        }
    )
    _refuse_nested(absolute)
    return absolute


def _secret_files(config: Config, base: Path) -> dict[str, BaseModel]:
    """Locate the files of secrets; only the commands that need a secret read it."""
    found: dict[str, BaseModel] = {}
    for name, key in (("web", "password_file"), ("notify", "webhook_file")):
        table = getattr(config, name)
        if (file := getattr(table, key)) is not None:
            found[name] = table.model_copy(update={key: locate(file, base)})
    return found


def _refuse_nested(config: Config) -> None:
    """Refuse folders in the inbox: their files would be taken in as jobs."""
    for name in ("outbox", "failed", "state_dir", "lora_dir", "metrics_file"):
        place: Path | None = getattr(config, name)
        if place is not None and place.resolve().is_relative_to(config.inbox.resolve()):
            where = f"{name} ({place}) lies in the inbox ({config.inbox})"
            raise ConfigError(f"{where}: move one of them")


def poll_seconds(config: Config) -> float:
    """Say how often to scan: as configured, else by whether the inbox's file system reports all changes."""
    if config.poll_seconds is not None:
        return config.poll_seconds
    return 10.0 if files.filesystem_type(config.inbox).startswith(UNWATCHED_FILESYSTEMS) else 60.0
