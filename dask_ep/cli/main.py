"""How is the package used from a shell?

    dask-ep example DIR   ->   plan JOB   ->   run JOB   ->   verify JOB        inspect PATH

Each command is a module, `example_command` and so on, which is imported when the command is used,
so that help is shown at once. It reads its options, calls the library and prints. Exit codes: 0
done, 1 failed or stopped, 2 wrong usage, 3 `verify` or `compare` found a difference.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from dask_ep import __version__
from dask_ep.cli.command import FAILED, WRONG_USE, complain, one_line
from dask_ep.errors import JobError, NoDeviceError

COMMANDS = {
    "example": "Write a job and its data into DIRECTORY, to try things out.",
    "plan": "Show what a job will cost: rows, bytes, memory, tasks and time.",
    "run": "Compute the output of JOB, a TOML file, and write it.",
    "collect": "Collect statistics of JOB's experts over the rows routed to them.",
    "verify": "Recompute a sample of JOB's output in plain loops, and compare.",
    "compare": "Compare a layer of two checkpoints A and B on tokens, or two outputs A and B.",
    "inspect": "Show what PATH is: an array, a checkpoint, a job, or an output and its progress.",
}
"""The first line of each command's help, in the order of their use."""


def main(
    arguments: list[str] | None = None,
    command: click.Command | None = None,
    name: str = "dask-ep",
) -> None:
    """Run the command; any error becomes one line and an exit code.

    Parameters
    ----------
    arguments : without the program's name; by default those of this process
    command : by default `main`; a script may pass its own
    name : of the program, for its usage
    """
    settings: dict[str, Any] = {"debug": False}
    command = cli if command is None else command
    try:
        sys.exit(command.main(arguments, name, standalone_mode=False, obj=settings))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        complain("stopped")
        sys.exit(FAILED)
    except (JobError, NoDeviceError) as error:
        complain(str(error))
        sys.exit(WRONG_USE)
    except Exception as error:
        if settings["debug"]:
            raise
        complain(one_line(error))
        sys.exit(FAILED)


class _Commands(click.Group):
    """A group that imports a command when it is used, and not for the group's help."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(import_module(f"dask_ep.cli.{name}_command"), f"{name}_command")

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)
@click.version_option(__version__, prog_name="dask-ep")
def cli() -> None:
    """Mixture-of-Experts layers over more token rows than memory holds.

    \b
    Example, from nothing to a checked output:
      dask-ep example demo
      dask-ep run demo/job.toml
      dask-ep verify demo/job.toml
    """


if __name__ == "__main__":
    main()
