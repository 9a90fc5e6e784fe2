"""The command line: one command a file. ``blockstep --help`` lists them.

Exit codes: 0 done (for ``status``: healthy), 1 degraded, 2 at risk, 3 error; a usage error is 3 as well. As in shells
130 after Ctrl-C, and 141 if whoever reads the output goes before its end, which is nothing to a server. Only ``daemon``
has those of the program in whose place it stands: 0, and 1 for every error; and so has ``img``, see there.

A command imports what it needs and no other's: whoever types ``failover`` is in a hurry, and a server serves its first
request a good part of a second earlier for that. So this module imports nothing but the standard library until it
knows which command is wanted; the module of a command imports little more than its options need, which is what the
help asks of all of them, and the rest when it is called; and typer comes in when there is something to explain
(`blockstep.cli.words`).

`typing` is no small part of a short command, and most of it is for mypy. So the modules here, and those that
`img check` imports, import it for mypy only, below ``TYPE_CHECKING = False``, which mypy takes for true; their
annotations are not evaluated. What options are written with is in `blockstep.forms`, records are those of
`blockstep.records`.
`signal` stays, though it brings `enum` with it (2 ms): Ctrl-C has to end a program from the first import on.
"""

from __future__ import annotations

import atexit
import gc
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    import typer

    app: typer.Typer

ERROR = 3

#: The commands, in the order of the help. Each is the function of that name in the module of that name here; ``img``
#: is a group of them, and ``daemon`` has a command line of its own.
COMMANDS: Final = ("export", "img", "standby", "primary", "daemon", "status", "checkpoint", "failover", "resize",
                   "stop", "events", "graph", "shell", "demo")


def make_app(*commands: str) -> typer.Typer:
    """The application with these commands, whose modules are imported for it."""
    from importlib import import_module

    import typer

    from blockstep.cli.words import for_typer

    app = typer.Typer(
        name="blockstep",
        help="Checkpointed block replication with instant failover, for any disk that can be reached over NBD.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name in commands:
        module = import_module(f"blockstep.cli.{name}")
        if name == "img":
            app.add_typer(module.make_app())
        else:
            app.command(name)(for_typer(getattr(module, name)))

    def print_version(wanted: bool) -> None:
        if wanted:
            _print_version()
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
    # What is imported stays, and to look for garbage among it is 10 ms at the start and 10 at the end. An event loop,
    # which all that takes its time runs in, begins with `gc.freeze` and `gc.enable`.
    gc.disable()
    atexit.register(gc.freeze)
    wanted, *words = sys.argv[1:] or [""]
    error_code = 1 if wanted in ("img", "daemon") else ERROR
    code: int | str | None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Unless a command has its own way to end, nothing is to be taken away; and an exception in the middle of an
        # import is a traceback, is lost, or brings a module down that is not written in Python.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from blockstep import streams
        from blockstep.errors import BlockstepError, told

        streams.open_missing()
        streams.print_all_names()
        try:
            code = _carry_out(wanted, words)
            if code is None:
                code = _explain(wanted, error_code)
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()  # what cannot be printed is an error as well
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except (BlockstepError, OSError) as error:
        if isinstance(error, BrokenPipeError) and streams.nobody_reads():
            streams.forget(1)  # what is left of it goes nowhere
            code = 128 + signal.SIGPIPE
        else:
            streams.complain(f"blockstep: {told(error)}")
            code = error_code
    sys.exit(code)


def _carry_out(wanted: str, words: list[str]) -> int | None:
    """The exit code of a command line that needs no explanation. None: typer has to look at it."""
    if wanted == "--version":
        _print_version()
        return 0
    if wanted == "daemon":
        from blockstep.cli import daemon_line  # its options are not typer's, and neither are its errors

        return daemon_line.main(words)
    if wanted == "img":
        from blockstep.cli import img

        return img.main(words)
    if wanted not in COMMANDS:
        return None
    from importlib import import_module

    from blockstep.cli.words import parsed

    command = getattr(import_module(f"blockstep.cli.{wanted}"), wanted)
    given = parsed(command, words)
    return None if given is None else command(**given) or 0


def _explain(wanted: str, error_code: int) -> int:
    """Help, or an error; or what a command did whose words only typer understands."""
    import typer

    from blockstep.streams import complain

    try:
        code = make_app(*((wanted,) if wanted in COMMANDS else COMMANDS))(standalone_mode=False)
    except typer.Abort:
        return 130
    except SystemExit:  # so it ends when whoever reads the help has gone, and only then
        raise BrokenPipeError from None
    except typer.TyperException as error:
        said = error.format_message().replace(": Value error, ", ": ")
        complain(said if said.startswith("Usage: ") else f"blockstep: {said} (see --help)")
        return error_code
    return code if isinstance(code, int) else 0


def _print_version() -> None:
    from blockstep import __version__

    print(f"blockstep {__version__}")
