"""What do all commands share: exit codes, how errors are shown, ``--debug``?

Imports nothing heavy, so that help is shown at once.
"""

from __future__ import annotations

import errno
import os

import click

FAILED, WRONG_USE, DIFFERENT = 1, 2, 3
"""Exit codes: failed or stopped, wrong usage, `verify` or `compare` found a difference."""


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj["debug"] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show full tracebacks.",
)


def complain(text: str) -> None:
    click.echo(f"dask-ep: {text}", err=True)


def echo_note(text: str) -> None:
    """Show a note about what may be a mistake."""
    click.echo(f"note: {text}", err=True)


def _words(error: BaseException) -> str:
    """Return the message of an error, without the system's error number."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error).strip()
    place = "" if error.filename is None else f": {error.filename}"
    is_full = error.strerror in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    return f"{error.strerror}{place}{'; free some space, or write elsewhere' * is_full}"


def one_line(error: BaseException) -> str:
    """Describe an error and its causes in one line, without the traceback."""
    words = [_words(error) or type(error).__name__]
    words[0] += "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    cause = error.__cause__
    while cause is not None:
        why = _words(cause)
        if why and not any(why in earlier for earlier in words):
            words.append(why)
        cause = cause.__cause__
    return "; because ".join(words)
