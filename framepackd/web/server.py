"""``framepackd web``: builds the page and serves it."""

import logging
import os
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from framepackd.problems import CommandError
from framepackd.settings.config import Config
from framepackd.web.drop import remove_unfinished
from framepackd.web.origins import Hosts, is_loopback
from framepackd.web.uploads import Uploads, own_folder, received, temporary

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from framepackd.web.doors import Doors
    from framepackd.web.events import Watch


class WebError(CommandError):
    """The page cannot be served; the text says why and what to do."""

    exit_code = 2


USER = "framepackd"
MB = 10**6
# Not needed, and they bypass the doors: tools for language models, records on the hub, a second server.
OFF = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_MCP_SERVER", "GRADIO_RUN_HISTORY", "GRADIO_SSR_MODE")


def serve(config: Config, server: str, port: int, *, share: bool = False) -> None:
    """Serve the page until SIGTERM or Ctrl-C.

    Raises:
        SecretError: the password cannot be read.
        WebError: gradio is not installed, or the address is open to others without a password.
        OSError: the address cannot be listened on.
    """
    password = config.web.read_password()
    if not password and (share or not is_loopback(server)):
        raise WebError(
            f"{'--share' if share else server} lets others in: set a password "
            "(password_file under [web] in the configuration, or FRAMEPACKD_WEB__PASSWORD)"
        )
    hosts = Hosts(server, config.web.hosts, others=share or not is_loopback(server))
    remove_unfinished(config)
    with own_folder(config) as private:
        _settle_in(private)
        try:
            from framepackd.web.api import build, guarded
            from framepackd.web.events import Watch
            from framepackd.web.pages import make_site
            from framepackd.web.site import Shared
        except ImportError as error:
            raise WebError(
                f'the page needs gradio, which cannot be imported ({error}): pip install "framepackd[web]"'
            ) from error
        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
        page = build(config)
        shared = Shared(config, private)
        watch = Watch(shared)
        try:
            page.launch(
                server_name=server,
                server_port=port,
                share=share,
                auth=(USER, password) if password else None,
                allowed_paths=[str(config.outbox)],
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=config.web.upload_limit_mb * MB,
                enable_monitoring=False,
                _app=guarded(
                    lambda app, gradio: _doors(make_site(app, gradio, shared, watch), config, hosts, private)
                ),
            )
        except OSError as error:
            raise OSError(
                f"{server}:{port} cannot be listened on ({error}): choose another with --port"
            ) from error
        _end_on_signals(watch)
        print(f"framepackd's page: {page.local_url}", flush=True)
        if share:
            print(f"for others: {page.share_url}", flush=True)
        page.block_thread()


def _end_on_signals(watch: "Watch") -> None:
    """End as Ctrl-C does, so that nothing stays behind; first the streams, which the server waits for."""

    def end(number: int, frame: FrameType | None) -> None:
        watch.end()
        signal.default_int_handler(number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _settle_in(private: Path) -> None:
    """Have this process write to a folder on a disk, and gradio too, which reads these when imported."""
    tempfile.tempdir = str(temporary(private))
    os.environ |= dict.fromkeys(OFF, "False") | {
        "GRADIO_NUM_WORKERS": "0",
        "GRADIO_TEMP_DIR": str(received(private)),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary(private)),
    }


def _doors(app: "ASGIApp", config: Config, hosts: Hosts, private: Path) -> "Doors":
    """Put the doors before gradio, which on GET logs out, and writes links to the state of the page."""
    from framepackd.web.doors import Doors
    from framepackd.web.passwords import Tries

    web = config.web
    return Doors(
        app,
        hosts=hosts,
        uploads=Uploads(private, limit=web.upload_limit_mb * MB, quota=web.upload_quota_mb * MB),
        tries=Tries(),
        upload="/upload",
        login="/login",
        changing=("/logout", "/deep_link"),
    )
