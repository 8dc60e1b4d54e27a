"""``framepackd web``: builds the page and serves it."""

import ipaddress
import logging
import os
import signal
import tempfile
from pathlib import Path

from framepackd.config import Config
from framepackd.secret_files import SecretError


class WebError(Exception):
    """The page cannot be served; the text says why and what to do."""


USER = "framepackd"


def serve(config: Config, server: str, port: int, *, share: bool = False) -> None:
    """Serve the page until interrupted or told to end.

    Raises:
        WebError: gradio is not installed, or the address is open to others without a password.
        OSError: the address cannot be listened on.
    """
    try:
        password = config.web.read_password()
    except SecretError as error:
        raise WebError(str(error)) from error
    if not password and (share or not _is_own(server)):
        raise WebError(
            f"{'--share' if share else server} lets others in: set a password "
            "(password_file under [web] in the configuration, or FRAMEPACKD_WEB__PASSWORD)"
        )
    with tempfile.TemporaryDirectory(prefix="framepackd-web-") as private:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": private}
        try:
            from framepackd.web.page import STYLE, build, theme
        except ImportError as error:
            raise WebError(
                f'the page needs gradio, which cannot be imported ({error}): pip install "framepackd[web]"'
            ) from error
        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
        page = build(config, Path(private))
        try:
            page.launch(
                server_name=server,
                server_port=port,
                share=share,
                auth=(USER, password) if password else None,
                auth_message=f"The user is {USER}." if password else None,
                theme=theme(),
                css=STYLE,
                allowed_paths=[str(config.outbox)],
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                max_file_size="200mb",
            )
        except OSError as error:
            raise OSError(
                f"{server}:{port} cannot be listened on ({error}): choose another with --port"
            ) from error
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing stays behind
        print(f"framepackd's page: {page.local_url}", flush=True)
        if share:
            print(f"for others: {page.share_url}", flush=True)
        page.block_thread()


def _is_own(server: str) -> bool:
    """Say whether an address is reached from this machine only."""
    try:
        return server == "localhost" or ipaddress.ip_address(server).is_loopback
    except ValueError:
        return False
