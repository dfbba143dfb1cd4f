"""What all commands of the command line share: options, the way examples are shown, and errors in one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import click

from contracts.errors import SluiceError
from contracts.units import parse_bytes

run_dir = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the node's sockets. [default: $XDG_RUNTIME_DIR/sluice or /tmp/sluice-UID]",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, for machines.")


def size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """A size in bytes, as people write it: 512Mi. A click callback."""
    try:
        found = None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if found == 0:
        raise click.BadParameter("must be greater than 0")
    return found


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n  ".join(("\b\nExamples:", *lines))


def errors_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which says what went wrong in one line on standard error and ends with code 1."""

    @functools.wraps(command)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except SluiceError as error:
            click.echo(f"sluice: {error.message}", err=True)
        except OSError as error:
            if error.filename is None:
                raise
            click.echo(f"sluice: {error.filename}: {error.strerror}", err=True)
        else:
            return
        sys.exit(1)

    return guarded
