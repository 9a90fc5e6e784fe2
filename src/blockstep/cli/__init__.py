"""The command line: one command a file. ``blockstep --help`` lists them.

Exit codes: 0 done (for ``status``: healthy), 1 degraded, 2 at risk, 3 error; a usage error is 3 as well. Only
``daemon`` has those of the program in whose place it stands: 0, and 1 for every error; and so has ``img``, see there.

A command imports what it needs and no other's: ``daemon`` serves its first request a good part of a second earlier
for that. So this module imports nothing but the standard library until it knows which command is wanted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import typer

    app: typer.Typer

ERROR = 3

#: The commands, in the order of the help. Each is the module of that name here.
COMMANDS: Final = ("export", "img", "standby", "primary", "daemon", "status", "checkpoint", "failover", "resize",
                   "stop", "events", "graph", "shell", "demo")


def make_app(*commands: str) -> typer.Typer:
    """The application with these commands, whose modules are imported for it."""
    import typer

    app = typer.Typer(
        name="blockstep",
        help="Checkpointed block replication with instant failover, for any disk that can be reached over NBD.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for command in commands:
        importlib.import_module(f"blockstep.cli.{command}").add_to(app)

    def print_version(wanted: bool) -> None:
        if wanted:
            from blockstep import __version__

            typer.echo(f"blockstep {__version__}")
            raise typer.Exit

    @app.callback()
    def common(
        version: bool = typer.Option(False, "--version", callback=print_version, is_eager=True,
                                     help="Print the version."),
    ) -> None:
        pass

    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return make_app(*COMMANDS)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def main() -> None:
    """The entry point. Errors are one line on standard error."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if wanted == "daemon":
        from blockstep.cli import daemon_line  # its options are not typer's, and neither are its errors

        sys.exit(daemon_line.main(sys.argv[2:]))
    if wanted == "img":
        from blockstep.cli import img

        code = _quickly(img.main)
        if code is not None:
            sys.exit(code)
    _run(make_app(*((wanted,) if wanted in COMMANDS else COMMANDS)), 1 if wanted == "img" else ERROR)


def _quickly(command: Callable[[list[str]], int | None]) -> int | None:
    """The exit code of a command that reads its words itself; None: it could not."""
    from blockstep.errors import BlockstepError

    try:
        return command(sys.argv[2:])
    except KeyboardInterrupt:
        return 130
    except (BlockstepError, OSError) as error:
        print(f"blockstep: {error}", file=sys.stderr)
        return 1


def _run(app: typer.Typer, error_code: int) -> None:
    import typer

    from blockstep.errors import BlockstepError

    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer.TyperException as error:
        print(f"blockstep: {error.format_message()} (see --help)", file=sys.stderr)
        sys.exit(error_code)
    except (BlockstepError, OSError) as error:
        print(f"blockstep: {error}", file=sys.stderr)
        sys.exit(error_code)
