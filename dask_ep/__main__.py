"""How does the command begin? Both ``dask-ep`` and ``python -m dask_ep`` start here.

What the command needs takes a second to import; Ctrl-C meanwhile ends it silently.
"""

import signal


def main() -> None:
    """Import the command, and run it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dask_ep.cli import main as cli

    signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
