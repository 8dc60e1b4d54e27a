"""Which packages there are: all wings, and the units of systemd, which lie beside them in a checkout.

Man pages (by click-man) and completions for three shells (by click) are made from the commands.
"""

import sys
from pathlib import Path

from click.shell_completion import get_completion_class
from click_man.core import write_man_pages
from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))
from framepack_core import __version__
from framepackd.cli.main import main

MADE = Path("build/share")
COMPLETIONS = {  # below PREFIX/share, where each shell looks for them
    "bash": "bash-completion/completions/framepackd",
    "zsh": "zsh/site-functions/_framepackd",
    "fish": "fish/vendor_completions.d/framepackd.fish",
}


def made_of_the_commands() -> list[tuple[str, list[str]]]:
    """Write man pages and completions; gives them as setuptools wants ``data_files``."""
    pages = MADE / "man/man1"
    pages.mkdir(parents=True, exist_ok=True)
    write_man_pages("framepackd", main, version=__version__, target_dir=str(pages))
    for shell, path in COMPLETIONS.items():
        complete = get_completion_class(shell)
        assert complete is not None
        (MADE / path).parent.mkdir(parents=True, exist_ok=True)
        (MADE / path).write_text(complete(main, {}, "framepackd", "_FRAMEPACKD_COMPLETE").source())
    files = sorted(path for path in MADE.rglob("*") if path.is_file())
    return [(f"share/{path.parent.relative_to(MADE)}", [str(path)]) for path in files]


setup(
    packages=[*find_packages(include=["framepack_core*", "framepackd*"]), "framepackd.systemd"],
    data_files=made_of_the_commands(),
)
