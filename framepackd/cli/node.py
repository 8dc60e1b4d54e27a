"""framepackd node: lends this machine's cards to a daemon, or opens the door to those of others."""

import re
import socket
from importlib.util import find_spec
from pathlib import Path

import click

from framepackd.cli.options import config_option, fail, load, log_to_stderr

FIRST_PORT = 6380  # the one after the head's usual one


@click.command(short_help="Lend this machine's cards to a daemon, or meet those who do.")
@config_option
@click.option("--head", metavar="HOST:PORT", help="Where the daemon's machine is; else the config's address.")
@click.option("--name", help="What the daemon calls this machine; else its host name.")
@click.option("--cpu", is_flag=True, help="Lend the processor as a card too: slow, for trials.")
@click.option("--first-port", type=click.IntRange(1024, 64535), default=FIRST_PORT, show_default=True)
@click.option("--runtime-dir", type=click.Path(path_type=Path), help="For sockets; else where the socket is.")
def node(
    config_file: Path | None,
    *,
    head: str | None,
    name: str | None,
    cpu: bool,
    first_port: int,
    runtime_dir: Path | None,
) -> None:
    """Run this machine's part of a cluster in the foreground, until SIGTERM or Ctrl-C.

    The same command on every machine. Where HOST is this machine, all others meet here, and the daemon
    beside it reaches their cards. Elsewhere this machine lends its cards. Listens at the head's port, and at
    1000 ports from the first one on.
    """
    config = load(config_file)
    where = head or config.cluster.address
    if find_spec("ray") is None:
        fail("this needs Ray: pip install 'framepackd[cluster]'", 1)
    if where is None:
        fail("--head HOST:PORT is needed, or address under [cluster]: the machine of the daemon", 2)
    if config.cluster.token_file is None:
        fail(
            "token_file under [cluster] is needed: the secret that all machines share. See docs/cluster.md", 2
        )
    from framepack_core.memory import before_torch
    from framepackd.cluster.host import Host, run
    from framepackd.cluster.node_file import NodeFile
    from framepackd.cluster.ray_process import Head
    from framepackd.cluster.trust import Trust
    from framepackd.text import HOST_NAME

    called = name or socket.gethostname()
    if not re.fullmatch(HOST_NAME, called, re.ASCII):
        fail(f"the daemon cannot name a machine {called!r}: give letters, digits, - and . with --name", 2)
    log_to_stderr()
    address, table = Head.at(where), config.cluster
    # Beside a daemon the cards are the daemon's own.
    cards = () if address.is_here else tuple(f"cuda:{number}" for number in range(before_torch.card_count()))
    run(
        Host(
            head=address,
            name=called,
            devices=cards + (("cpu",) if cpu else ()),
            folder=runtime_dir or table.socket_path.parent,
            socket=table.socket_path,
            front_user=table.front_user,
            trust=Trust(config.cluster.token_file, table.tls_cert, table.tls_key, table.tls_ca),
            first_port=first_port,
            own=NodeFile(
                models={spec.name: spec for spec in config.specs()},
                scratch=config.state_dir / "scratch",
                cache=config.cache_dir,
                preview_decoder=config.preview_decoder,
            ),
        )
    )
