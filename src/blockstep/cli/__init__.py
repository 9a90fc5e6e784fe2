"""The command line: one command a file. ``blockstep --help`` lists them.

Exit codes: 0 done (for ``status``: healthy), 1 degraded, 2 at risk, 3 error; a usage error is 3 as well.
"""

from __future__ import annotations

import sys

import typer

from blockstep import __version__
from blockstep.cli import (
    checkpoint,
    demo,
    events,
    export,
    failover,
    graph,
    primary,
    resize,
    shell,
    standby,
    status,
    stop,
)
from blockstep.errors import BlockstepError

ERROR = 3

app = typer.Typer(
    name="blockstep",
    help="Checkpointed block replication with instant failover, for any disk that can be reached over NBD.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (export, standby, primary, status, checkpoint, failover, resize, stop, events, graph, shell, demo):
    command.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockstep {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """The entry point. Errors are one line on standard error."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer.TyperException as error:
        print(f"blockstep: {error.format_message()} (see --help)", file=sys.stderr)
        sys.exit(ERROR)
    except (BlockstepError, OSError) as error:
        print(f"blockstep: {error}", file=sys.stderr)
        sys.exit(ERROR)
