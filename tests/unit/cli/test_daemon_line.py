"""The words of ``blockstep daemon``, told apart; and the commands that there are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blockstep import cli
from blockstep.cli.daemon_line import main, split
from blockstep.errors import BlockstepError


def test_steps_keep_their_order_and_the_rest_is_of_the_whole() -> None:
    line = split(["--object", "a", "--pidfile=p", "--blockdev=b=1,c=2", "--daemonize", "--object", "--qmp", "--name",
                  "", "--pidfile", "q"])
    assert line.steps == [("object", "a"), ("blockdev", "b=1,c=2"), ("object", "--qmp")]
    assert line.whole == {"pidfile": "q", "daemonize": "", "name": ""}


def test_beginnings_of_names_will_do_where_they_are_unique() -> None:
    line = split(["--block", "b", "--nbd", "n", "--exp=e", "--d", "-V", "-h"])
    assert line.steps == [("blockdev", "b"), ("nbd-server", "n"), ("export", "e")]
    assert line.whole == {"daemonize": "", "version": "", "help": ""}
    with pytest.raises(BlockstepError, match="'--n' may be --nbd-server or --name"):
        split(["--n", "x"])


@pytest.mark.parametrize("words", [["--"], [""], ["-x"], ["x"], ["--=x"], ["--blockdevs", "x"], ["--qmp"],
                                   ["--help=all"]])
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(BlockstepError):
        split(words)


def test_an_error_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--blockdevs", "x"]) == 1
    assert capsys.readouterr().err.startswith("blockstep: there is no option '--blockdevs'")


def test_the_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["blockstep", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in listed


def test_every_module_of_a_command_is_in_the_table() -> None:
    """`blockstep COMMAND` and `blockstep --help` must agree on what there is."""
    folder = Path(cli.__file__).parent
    named = {path.stem for path in folder.glob("*.py") if f"\ndef {path.stem}(" in path.read_text()}
    assert named | {"img"} == set(cli.COMMANDS)
