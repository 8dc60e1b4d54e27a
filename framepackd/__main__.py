"""``python -m framepackd`` is the command."""

from framepackd.cli.main import main

if __name__ == "__main__":
    main(prog_name="framepackd")
