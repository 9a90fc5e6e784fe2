"""What is read without typer is read as typer does."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from blockstep.cli import COMMANDS, img
from blockstep.cli.words import Argument, Option, Order, parsed, typer_app
from blockstep.forms import Annotated, Literal

SEEN: list[dict[str, Any]] = []


def work(
    one: Annotated[str, Argument("ONE")],
    rest: Annotated[list[str] | None, Argument("REST")] = None,
    name: Annotated[str | None, Option("-n", "--name", noted=True)] = None,
    number: Annotated[int, Option("-m", "--number")] = 8,
    many: Annotated[list[str] | None, Option("-o", noted=True)] = None,
    kind: Annotated[Literal["a", "b"], Option()] = "a",
    quick: Annotated[bool, Option("-q", "--quick", noted=True)] = False,
    loud: Annotated[bool, Option("-l", "--loud")] = False,
    wait_for: Annotated[bool, Option()] = True,
    path: Annotated[Path | None, Option("--path")] = None,
    order: Order = Order(),  # noqa: B008
) -> int:
    """Something."""
    SEEN.append(locals())
    return 7


def by_typer(words: list[str], dashed: bool) -> dict[str, Any] | None:
    app = typer_app("x", "Help.", {"work": work, "other": lambda: None}, ["work"] if dashed else [])
    SEEN.clear()
    try:
        assert app(["work", *words], standalone_mode=False) == 7
    except typer.TyperException:
        return None
    return SEEN[0]


def by_us(words: list[str], dashed: bool) -> dict[str, Any] | None:
    given = parsed(work, words, dashed)
    if given is None:
        return None
    SEEN.clear()
    work(**given)
    return SEEN[0]


RIGHT = [
    "a", "a b c", "-q a", "a -q", "-ql a", "-lqm3 a", "-m 3 a", "-m3 a", "--number=3 a", "--number 3 a",
    "-n x a -q -o 1 -o 2", "-o 2 -q -n x a", "-q -o 1 a -q -o 2", "--kind b a", "--kind=a a", "-n -q a",
    "-- a -q", "a -- -q --x", "- a", "--name= a", "--no-wait-for a", "--wait-for a", "--no-wait-for --wait-for a",
    "--path x/y a", "--path= a",
]
WRONG = ["", "-x a", "--nam x a", "a -n", "--kind c a", "-m x a", "--quick=1 a", "-lx a", "--no-quick a",
         "--no-wait-for=1 a", "--path", "--help"]


@pytest.mark.parametrize("line", RIGHT)
def test_words_mean_what_they_mean_to_typer(line: str) -> None:
    words = line.split(" ")
    assert (ours := by_us(words, dashed=False)) is not None
    assert ours == by_typer(words, dashed=False)


@pytest.mark.parametrize("line", ["a -1", "a -12G -q"])
def test_a_number_below_zero_can_be_an_argument(line: str) -> None:
    assert by_us(line.split(), dashed=True) == by_typer(line.split(), dashed=True) != None  # noqa: E711
    assert by_us(line.split(), dashed=False) is None


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_or_asks_for_help_is_left_to_typer(line: str) -> None:
    assert by_us(line.split(), dashed=False) is None


def test_the_order_of_options_is_told() -> None:
    given = parsed(work, ["-q", "-o", "1", "-n", "x", "-o", "2", "a"])
    assert given is not None
    assert given["order"] == ["quick", "many", "name"]


@pytest.mark.parametrize("name", img.COMMANDS)
def test_every_command_of_img_can_be_read(name: str) -> None:
    words = {"rebase": "-b x a", "compare": "a b", "resize": "a -1G", "bitmap": "--add a b"}.get(name, "a")
    assert parsed(img.COMMANDS[name], words.split(), name == "resize") is not None


@pytest.mark.parametrize(("name", "words"), {
    **dict.fromkeys(COMMANDS, ""), "export": "a -r --cache none --tls-verify-peer", "resize": "a 1G",
    "standby": "--disk a=b", "primary": "--disk a=b --standby c --ack both", "failover": "--no-wait --to latest",
    "status": "-w", "shell": "-c a -c b", "demo": "--disks 3"}.items())
def test_every_other_command_can_be_read(name: str, words: str) -> None:
    if name in ("img", "daemon"):
        return
    command = getattr(import_module(f"blockstep.cli.{name}"), name)
    assert parsed(command, words.split()) is not None
