"""The daemon's configuration: a TOML file, over it environment variables ``FRAMEPACKD_...``."""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from framepack_core.errors import RequestError
from framepack_core.models import BUILT_IN, ModelSpec, Source
from framepack_core.request import explain
from framepack_core.sections import Kind
from framepackd import files
from framepackd.secret_files import SecretError, locate, secret, webhook_address
from framepackd.settings import parse_settings, refuse_shared

ENV_PREFIX = "FRAMEPACKD_"
CONFIG_VARIABLE = "FRAMEPACKD_CONFIG"
# What framepackd notify tells its command, which may well ask framepackd for more: no keys of the config.
EVENT_VARIABLES = tuple(f"FRAMEPACKD_{name}" for name in ("EVENT", "JOB", "NAME", "OUTPUT", "ERROR"))
# Where events of other machines' writes do not arrive.
UNWATCHED_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "virtiofs", "vboxsf", "ceph")


# A host as a browser names it: a name or an IPv6 address in brackets, and perhaps a port.
HOST = re.compile(
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?", re.ASCII
)


class ConfigError(Exception):
    """The configuration cannot be read; the text says where and why."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuConfig(_Section):
    """Where and how the model computes."""

    device: str = "auto"  # auto, cpu, cuda, cuda:0 ...
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    precision: Literal["exact", "fp8", "nf4"] = "exact"
    attention: str = "auto"  # or a backend of diffusers; see attention.py
    compile: Literal["auto"] | bool = "auto"
    vae_tiling: Literal["auto"] | bool = "auto"
    idle_unload_seconds: float = Field(600.0, ge=0, le=31_536_000)  # 0: never


class WebConfig(_Section):
    """Where ``framepackd web`` listens."""

    server: str = "127.0.0.1"
    port: int = Field(7860, ge=1, le=65535)
    password: str = Field("", repr=False)  # needed wherever others can reach it
    password_file: Path | None = None  # which holds it instead
    hosts: tuple[str, ...] = ()  # by which names it answers besides this machine's own
    upload_limit_mb: int = Field(200, ge=1, le=100_000)  # of 10^6 bytes; one upload
    upload_quota_mb: int = Field(5000, ge=1, le=10_000_000)  # all that lie there at once

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host.lower()):
                raise ValueError(
                    f'hosts must be names such as "films.example", perhaps with a port, got {host!r}'
                )
        return hosts

    @model_validator(mode="after")
    def _check_password(self) -> "WebConfig":
        if self.password and self.password_file is not None:
            raise ValueError("password and password_file are both set: leave one of them out")
        return self

    def read_password(self) -> str:
        """Give the password, from wherever it is; empty if there is none.

        Raises:
            SecretError: its file cannot be used.
        """
        return self.password if self.password_file is None else secret(self.password_file, "password_file")


class NotifyConfig(_Section):
    """Who is told of what became of jobs, by ``framepackd notify``."""

    command: tuple[str, ...] = ()
    webhook: str | None = Field(None, repr=False)  # its path is a secret
    webhook_file: Path | None = None  # which holds it instead
    events: tuple[Literal["done", "failed", "queue_empty"], ...] = ("done", "failed", "queue_empty")
    timeout_seconds: float = Field(30.0, gt=0, le=3600)
    attempts: int = Field(5, ge=1, le=100)

    @field_validator("webhook")
    @classmethod
    def _check_webhook(cls, url: str | None) -> str | None:
        return url if url is None else webhook_address(url, "webhook")

    @model_validator(mode="after")
    def _check_both(self) -> "NotifyConfig":
        if self.webhook is not None and self.webhook_file is not None:
            raise ValueError("webhook and webhook_file are both set: leave one of them out")
        return self

    def read_webhook(self) -> str | None:
        """Give the webhook's address, from wherever it is; None if there is none.

        Raises:
            SecretError: its file cannot be used.
        """
        if self.webhook_file is None:
            return self.webhook
        try:
            return webhook_address(secret(self.webhook_file, "webhook_file"), str(self.webhook_file))
        except ValueError as error:
            raise SecretError(str(error)) from error


class ModelConfig(_Section):
    """A model of one's own, or another source for a built-in one."""

    kind: Kind
    transformer: str
    base: str = BUILT_IN["framepack"].base.location
    image_encoder: str = BUILT_IN["framepack"].image_encoder.location
    revision: str | None = None  # of the transformer; for the others write "org/name@revision"
    mag_ratios: Path | None = None  # written by `framepackd calibrate`

    def with_absolute_paths(self, base: Path) -> "ModelConfig":
        """Resolve those of the three that are folders against the config's folder; the others are hub ids."""
        folders = {
            key: str(base / Path(getattr(self, key)).expanduser())
            for key in ("transformer", "base", "image_encoder")
            if (base / Path(getattr(self, key)).expanduser()).exists()
        }
        ratios = base / self.mag_ratios.expanduser() if self.mag_ratios else None
        return self.model_copy(update={**folders, "mag_ratios": ratios})

    def spec(self, name: str) -> ModelSpec:
        """Build what the engine loads."""
        return ModelSpec(
            name=name,
            kind=self.kind,
            transformer=_source(self.transformer, self.revision),
            base=_source(self.base, None),
            image_encoder=_source(self.image_encoder, None),
            mag_ratios=self.mag_ratios,
        )


def _source(location: str, revision: str | None) -> Source:
    for built_in in BUILT_IN.values():
        for source in (built_in.transformer, built_in.base, built_in.image_encoder):
            if source.location == location and revision is None:
                return source  # with the revision that was tested
    if Path(location).is_dir():
        return Source(location)
    name, _, written = location.partition("@")
    return Source(name, written or revision)


class Config(BaseSettings):
    """Every key with its default; ``config.example.toml`` explains them."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    state_dir: Path = Field(default_factory=lambda: _default_state_dir())
    inbox: Path = Path("inbox")  # these three: in the state folder unless set
    outbox: Path = Path("outbox")
    failed: Path = Path("failed")
    lora_dir: Path = Path("loras")  # likewise
    settle_seconds: float = Field(5.0, ge=0, le=3600)
    poll_seconds: float | None = Field(None, gt=0, le=86400)  # None: 60, or 10 where events cannot be trusted
    model: str = "framepack"
    max_attempts: int = Field(3, ge=1, le=100)
    on_duplicate: Literal["run", "skip"] = "run"
    hang_seconds: float = Field(120.0, gt=0, le=86400)  # see runner.py
    results_page: bool = True
    preview_decoder: Path | None = None  # weights of TAEHV
    models: dict[str, ModelConfig] = {}
    gpu: GpuConfig = GpuConfig()
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
                raise ValueError(f"{key} must be one of {', '.join(self.model_names())}, got {name!r}")
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment over the TOML file, and nothing else."""
        return (
            named["init_settings"],
            named["env_settings"],
            TomlConfigSettingsSource(settings_cls, _reading.get("path")),
        )

    def model_names(self) -> list[str]:
        """Name the models that jobs may ask for."""
        return sorted({*BUILT_IN, *self.models})

    def spec(self, name: str) -> ModelSpec:
        """Give a model by name; one in the config stands before a built-in one of the same name."""
        return self.models[name].spec(name) if name in self.models else BUILT_IN[name]

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state_dir / "framepackd.db"

    @property
    def jobs_dir(self) -> Path:
        """The work folders, one a job."""
        return self.state_dir / "jobs"

    @property
    def cache_dir(self) -> Path:
        """Where what can be made anew is kept; some of it is code."""
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
        """The folders of its own that the daemon makes where they are missing; see also folders.py."""
        own = [self.lora_dir] if self.lora_dir.is_relative_to(self.state_dir) else []  # else read only
        return [self.state_dir, self.jobs_dir, *own]

    @property
    def folders(self) -> dict[str, Path]:
        """All folders that have to exist."""
        return {
            "state_dir": self.state_dir,
            "inbox": self.inbox,
            "outbox": self.outbox,
            "failed": self.failed,
        }


SECRET_KEYS = (("web", "password"), ("notify", "webhook"))
FIXED_KEYS = ("state_dir", "inbox", "outbox", "failed", "gpu")  # while a daemon runs


def changed(running: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """Give what a running daemon can take of a new configuration, which keys that changes, and which not."""
    differing = [key for key in Config.model_fields if getattr(new, key) != getattr(running, key)]
    fixed = [key for key in differing if key in FIXED_KEYS]
    taken = new.model_copy(update={key: getattr(running, key) for key in fixed})
    return taken, [key for key in differing if key not in fixed], fixed


# What the TOML source reads while a Config is built: pydantic-settings asks for it by a class method.
_reading: dict[str, Path] = {}


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
    where = str(found) if found else "environment"
    _refuse_unknown_variables()
    _reading.clear()
    if found is not None:
        _reading["path"] = found
    try:
        config = _with_absolute_paths(Config(), (found.parent if found else Path.cwd()).absolute())
    except ValidationError as error:
        raise ConfigError(f"{where}: {_without_secrets(error)}") from None  # which it would hold
    except (SettingsError, OSError, RuntimeError, ValueError) as error:  # not TOML, not UTF-8, no such home
        raise ConfigError(f"{where}: {error}") from error
    config._file = found
    return config


def _without_secrets(error: ValidationError) -> str:
    """Explain a mistake; where the value is a secret, without it."""
    for mistake in error.errors():
        location = tuple(part for part in mistake["loc"] if isinstance(part, str))
        if location[:2] in SECRET_KEYS or location in (("web",), ("notify",)):
            reason = str(mistake["msg"]).removeprefix("Value error, ")
            return f"{'.'.join(location)}: {reason[:1].lower()}{reason[1:]}"
    return explain(error, Config)


def _find_config() -> Path | None:
    if os.environ.get(CONFIG_VARIABLE):
        return Path(os.environ[CONFIG_VARIABLE])
    own = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "framepackd/config.toml"
    return next((path for path in (own, Path("/etc/framepackd/config.toml")) if path.is_file()), None)


def _default_state_dir() -> Path:
    if os.environ.get("STATE_DIRECTORY"):
        return Path(os.environ["STATE_DIRECTORY"].split(":")[0])
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "framepackd"


def _refuse_unknown_variables() -> None:
    """Name a mistyped variable: pydantic-settings ignores unknown ones at the top level."""
    for variable in os.environ:
        key = variable.upper().removeprefix(ENV_PREFIX).split("__")[0].lower()
        known = key in Config.model_fields or variable in (CONFIG_VARIABLE, *EVENT_VARIABLES)
        if variable.upper().startswith(ENV_PREFIX) and not known:
            raise ConfigError(f"environment: unknown key {key!r} ({variable}): correct it or unset it")


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
        update={"state_dir": state_dir, **others, "models": models, **optional, **_secret_files(config, base)}
    )
    _refuse_nested(absolute)
    return absolute


def _secret_files(config: Config, base: Path) -> dict[str, Any]:
    """Find the files of secrets; they are read only by who needs them."""
    found: dict[str, Any] = {}
    if config.web.password_file is not None:
        file = locate(config.web.password_file, base)
        found["web"] = config.web.model_copy(update={"password_file": file})
    if config.notify.webhook_file is not None:
        file = locate(config.notify.webhook_file, base)
        found["notify"] = config.notify.model_copy(update={"webhook_file": file})
    return found


def _refuse_nested(config: Config) -> None:
    """Keep results from being taken in again as jobs."""
    for name in ("outbox", "failed", "state_dir", "lora_dir", "metrics_file"):
        place: Path | None = getattr(config, name)
        if place is not None and place.resolve().is_relative_to(config.inbox.resolve()):
            where = f"{name} ({place}) lies in the inbox ({config.inbox})"
            raise ConfigError(f"{where}: move one of them")


def poll_seconds(config: Config) -> float:
    """Say how often to scan: as configured, else by whether the inbox's file system tells of all changes."""
    if config.poll_seconds is not None:
        return config.poll_seconds
    return 10.0 if files.filesystem_type(config.inbox).startswith(UNWATCHED_FILESYSTEMS) else 60.0
