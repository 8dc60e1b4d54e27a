"""The tables of the configuration: ``[gpu]``, ``[draft]``, ``[web]``, ``[notify]``, ``[models.NAME]``."""

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from framepack_core.memory import before_torch
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source, is_file, is_hub_folder
from framepack_core.request import Integer
from framepack_core.sections import Kind
from framepackd.settings.secret_files import SecretError, secret, webhook_address

# A host as a browser sends it: a name or an IPv6 address in brackets, optionally with a port.
HOST = re.compile(
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?", re.ASCII
)

OF_A_LIST = re.compile(r"cpu|cuda:\d+")
ALONE = re.compile(rf"auto|all|cuda|{OF_A_LIST.pattern}")
TIME = re.compile(r"\d+:[0-5]\d:[0-5]\d")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuConfig(_Section):
    """Where and how the model computes."""

    device: str | tuple[str, ...] = "auto"  # auto, cpu, cuda, cuda:0 ..., all, or a list, perhaps empty
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    precision: Literal["exact", "fp8", "nf4"] = "exact"
    attention: str = "auto"  # or a backend of diffusers; see attention.py
    compile: Literal["auto"] | bool = "auto"
    vae_tiling: Literal["auto"] | bool = "auto"
    move_after: timedelta | None = Field(None, gt=timedelta(0))  # None: a job waits for its card for ever
    idle_unload_seconds: float = Field(600.0, ge=0, le=31_536_000)  # 0: never

    @field_validator("device", mode="before")
    @classmethod
    def _check_devices(cls, device: object) -> object:
        if isinstance(device, str) and ALONE.fullmatch(device):
            return device
        names = device if isinstance(device, list | tuple) else None
        if names is None:
            kinds = '"auto", "cpu", "all", a card such as "cuda:0", or a list such as ["cuda:0", "cuda:1"]'
            raise ValueError(f"must be {kinds}, got {device!r}")
        for name in names:
            if not isinstance(name, str) or not OF_A_LIST.fullmatch(name):
                raise ValueError(f'in a list must be "cpu" or a card such as "cuda:0", got {name!r}')
            if name != "cpu" and names.count(name) > 1:
                raise ValueError(f"must name each card once, got {name!r} twice")
        return device

    @field_validator("move_after", mode="before")
    @classmethod
    def _read_seconds(cls, value: object) -> object:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)  # of the environment
        is_time = isinstance(value, str) and TIME.fullmatch(value)
        if value is None or isinstance(value, timedelta) or is_time:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f'must be seconds, more than 0, or "HH:MM:SS", got {value!r}')
        return value

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that compute, one job each; ``all`` is every card of the driver."""
        if self.device == "all":
            return tuple(f"cuda:{number}" for number in range(before_torch.card_count())) or ("cuda",)
        return (self.device,) if isinstance(self.device, str) else self.device


class DraftConfig(_Section):
    """What a job with ``draft = true`` saves; size, length and seed stay. Chosen by ``benchmarks drafts``."""

    steps: Integer = Field(10, ge=1, le=100)
    cache: Literal["none", "teacache", "magcache"] = "none"


class WebConfig(_Section):
    """Where ``framepackd web`` listens."""

    server: str = "127.0.0.1"
    port: int = Field(7860, ge=1, le=65535)
    password: str = Field("", repr=False)  # required if other machines can reach the page
    password_file: Path | None = None  # holds the password instead
    hosts: tuple[str, ...] = ()  # names that it answers to besides this machine's own
    upload_limit_mb: int = Field(200, ge=1, le=100_000)  # of 10^6 bytes, for one upload
    upload_quota_mb: int = Field(5000, ge=1, le=10_000_000)  # for all uploads that are kept at once

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host.lower()):
                raise ValueError(f'must be names such as "films.example", perhaps with a port, got {host!r}')
        return hosts

    @model_validator(mode="after")
    def _check_password(self) -> "WebConfig":
        if self.password and self.password_file is not None:
            raise ValueError("password and password_file are both set: leave one of them out")
        return self

    def read_password(self) -> str:
        """Give the password, from the config or its file; empty if there is none.

        Raises:
            SecretError: its file cannot be used.
        """
        return self.password if self.password_file is None else secret(self.password_file, "password_file")


class NotifyConfig(_Section):
    """What ``framepackd notify`` runs or calls when jobs end."""

    command: tuple[str, ...] = ()
    webhook: str | None = Field(None, repr=False)  # its path is often a secret
    webhook_file: Path | None = None  # holds the address instead
    events: tuple[Literal["done", "failed", "queue_empty"], ...] = ("done", "failed", "queue_empty")
    timeout_seconds: float = Field(30.0, gt=0, le=3600)
    attempts: int = Field(5, ge=1, le=100)

    @field_validator("webhook")
    @classmethod
    def _check_webhook(cls, url: str | None) -> str | None:
        return url if url is None else webhook_address(url, "notify.webhook")

    @model_validator(mode="after")
    def _check_both(self) -> "NotifyConfig":
        if self.webhook is not None and self.webhook_file is not None:
            raise ValueError("webhook and webhook_file are both set: leave one of them out")
        return self

    def read_webhook(self) -> str | None:
        """Give the webhook's address, from the config or its file; None if there is none.

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
    """A model of the user's, or another source for a built-in one."""

    kind: Kind
    transformer: str
    base: str = BUILT_IN["framepack"].base.location
    image_encoder: str = BUILT_IN["framepack"].image_encoder.location
    revision: str | None = None  # of the transformer; for the others write "org/name@revision"
    mag_ratios: Path | None = None  # written by `framepackd calibrate`

    def with_absolute_paths(self, base: Path) -> "ModelConfig":
        """Resolve sources that are folders or files against the config's folder; the others are hub ids."""
        folders = {
            key: str(base / Path(getattr(self, key)).expanduser())
            for key in ("transformer", "base", "image_encoder")
            if (base / Path(getattr(self, key)).expanduser()).exists() or is_file(Path(getattr(self, key)))
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
    if (path := Path(location)).exists():
        return Source(location, revision if is_hub_folder(path) else None)
    name, _, written = location.partition("@")
    return Source(name, written or revision)
