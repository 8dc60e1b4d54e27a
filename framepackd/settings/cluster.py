"""The table ``[cluster]`` of the configuration: which other machines compute, and how they are reached."""

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from framepackd.settings.secret_files import locate
from framepackd.text import HOST_NAME

ALL = "all"
NODE = re.compile(rf"(?P<host>{HOST_NAME})(?::(?P<device>cpu(?::\d{{1,3}})?|cuda:\d{{1,3}}))?", re.ASCII)
ADDRESS = re.compile(rf"(?:{HOST_NAME}|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{{1,5}})", re.ASCII)
RUN = Path("/run")  # of services of the machine
BRIDGES = Path("framepackd-node/bridges.sock")
TLS = ("tls_cert", "tls_key", "tls_ca")


class ClusterConfig(BaseModel):
    """Cards of other machines. Without ``nodes`` there are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: str | tuple[str, ...] = ()  # all, or machines and single cards of them
    address: str | None = None  # of the head, HOST:PORT
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    socket: Path | None = None  # of framepackd node on this machine; None: where its unit has it
    front_user: str = Field("framepackd", min_length=1)  # who may use that socket besides root

    @field_validator("nodes", mode="before")
    @classmethod
    def _check_nodes(cls, value: object) -> object:
        if value == ALL:
            return value
        names = value if isinstance(value, list | tuple) else None
        if names is None:
            kinds = '"all", or a list of machines and cards such as ["render2", "render3:cuda:0"]'
            raise ValueError(f"must be {kinds}, got {value!r}")
        for name in names:
            if not isinstance(name, str) or not NODE.fullmatch(name):
                kinds = 'a machine such as "render2" or one of its cards such as "render2:cuda:0"'
                raise ValueError(f"must be {kinds}, got {name!r}")
            if names.count(name) > 1:
                raise ValueError(f"must name each once, got {name!r} twice")
        return value

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = ADDRESS.fullmatch(value)
        if found is None or not 1 <= int(found["port"]) <= 65535:
            raise ValueError(f'must be a machine and a port such as "front:6379", got {value!r}')
        return value

    @model_validator(mode="after")
    def _check_tls(self) -> "ClusterConfig":
        missing = [key for key in TLS if getattr(self, key) is None]
        if 0 < len(missing) < len(TLS):
            raise ValueError(f"TLS needs {', '.join(TLS)}: set {' and '.join(missing)} too")
        return self

    @property
    def socket_path(self) -> Path:
        """Where ``framepackd node`` on this machine listens for bridges."""
        if self.socket is not None:
            return self.socket
        own = os.environ.get("XDG_RUNTIME_DIR")
        of_the_user = own is not None and not (RUN / BRIDGES.parent).is_dir()
        return (Path(str(own)) if of_the_user else RUN) / BRIDGES

    @property
    def hosts(self) -> tuple[str, ...]:
        """The machines that are named, each once; none if all are meant."""
        named = () if self.nodes == ALL else self.nodes
        return tuple(dict.fromkeys(name.partition(":")[0] for name in named))

    @property
    def cards(self) -> tuple[str, ...]:
        """The single cards that are named, as HOST:DEVICE."""
        return () if self.nodes == ALL else tuple(name for name in self.nodes if ":" in name)

    def wants(self, host: str, device: str) -> bool:
        """Say whether a card of a machine is to compute."""
        return self.nodes == ALL or host in self.nodes or f"{host}:{device}" in self.nodes

    def with_absolute_paths(self, base: Path) -> "ClusterConfig":
        """Locate its files below the config's folder, or those of trust among systemd's credentials."""
        trust = ("token_file", *TLS)
        found: dict[str, Path] = {
            key: locate(file, base) if key in trust else base / file.expanduser()
            for key in (*trust, "socket")
            if (file := getattr(self, key)) is not None
        }
        return self.model_copy(update=found)
