"""The command ``framepackd``, also as ``python -m framepackd``."""

import signal


def run() -> None:
    """Run the command; Ctrl-C before it has begun ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until Commands.invoke: the imports take a while
    from framepackd.cli.main import main

    main(prog_name="framepackd")


if __name__ == "__main__":
    run()
