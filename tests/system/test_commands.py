"""The commands of the operator against a running pair: what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from blockstep.testing.pair import Pair, environment
from blockstep.testing.processes import blockstep as blockstep_command
from blockstep.testing.processes import started
from blockstep.testing.proxy import Proxy
from blockstep.units import MiB
from tests.scenarios import scenario


async def blockstep(*arguments: str | Path, **env: str) -> tuple[int, str, str]:
    """Run a command: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "blockstep", *map(str, arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment(), **env})
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def as_json(*arguments: str | Path) -> tuple[int, Any]:
    code, out, err = await blockstep(*arguments, "--json")
    assert not err
    return code, json.loads(out)


@scenario
async def test_the_commands_from_the_first_sync_to_the_failover(tmp_path: Path) -> None:
    primary, standby = ("--qmp", tmp_path / "primary.qmp"), ("--qmp", tmp_path / "standby.qmp")
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")

        (code, status), (code2, there) = await asyncio.gather(
            as_json("status", *primary), as_json("status", *standby))
        assert (code, status["health"], status["role"]) == (0, "healthy", "primary")
        assert (code2, there["health"], there["role"]) == (0, "healthy", "standby")
        assert [disk["name"] for disk in status["disks"]] == ["disk0", "disk1"]

        epoch = status["checkpoint"]["epoch"]
        (code, answer), (code2, said, _) = await asyncio.gather(
            as_json("checkpoint", *primary), blockstep("checkpoint", *primary))
        assert code == code2 == 0
        assert answer["epoch"] in (epoch + 1, epoch + 2)
        assert said.startswith("checkpoint ")

        code, _, error = await blockstep("failover", *primary)
        assert code == 3
        assert error.startswith("blockstep: ")
        assert len(error.splitlines()) == 1

        pair.primary.kill()
        await pair.standby.until(state="lost")
        code, lost = await as_json("status", *standby)
        assert (code, lost["health"]) == (2, "at-risk")

        code, answer = await as_json("failover", *standby)
        assert code == 0
        assert answer["merged"] is True
        assert len(answer["exports"]) == 2
        (code, status), (dead, gone) = await asyncio.gather(
            as_json("status", *standby), as_json("status", *primary))
        assert (code, status["role"], status["state"]) == (1, "promoted", "promoted")
        assert dead == 3
        assert gone["error"].startswith(("Connection refused: ", "No such file or directory: "))


@scenario
async def test_status_for_people_names_what_matters(tmp_path: Path) -> None:
    async with Pair(tmp_path, size=8 * MiB, pair="web01") as pair:
        await pair.start("--checkpoint-every", "5s")
        await pair.primary.until(health="healthy")
        (code, said, _), (_, there, _) = await asyncio.gather(
            blockstep("status", "--qmp", tmp_path / "primary.qmp"),
            blockstep("status", "--qmp", tmp_path / "standby.qmp"))
        assert code == 0
        for word in ("web01", "PRIMARY", "replicating", "healthy", "checkpoint every 5", "disk0", "8 MiB"):
            assert word in said
        assert "STANDBY" in there


@scenario
async def test_the_runtime_directory_is_where_commands_look(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        runtime = tmp_path / "run"
        runtime.mkdir()
        for role in ("primary", "standby"):
            (runtime / f"test.{role}.qmp").symlink_to(tmp_path / f"{role}.qmp")
        where = {"RUNTIME_DIRECTORY": str(runtime)}
        both, one, several, nobody = await asyncio.gather(
            blockstep("status", "--json", **where), blockstep("checkpoint", "test", **where),
            blockstep("stop", **where), blockstep("status", "other", **where))
        assert [answer["role"] for answer in json.loads(both[1])] == ["primary", "standby"]
        assert one[0] == 0
        assert several[0] == nobody[0] == 3
        assert "test.primary, test.standby" in several[2]
        assert "pair 'other'" in nobody[2]


@scenario
async def test_events_are_printed_as_they_happen(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "blockstep", "events", "--json", "--qmp", str(tmp_path / "primary.qmp"),
            stdout=subprocess.PIPE, env={**environment(), "PYTHONUNBUFFERED": "1"})
        assert process.stdout
        async with asyncio.timeout(10):
            first = json.loads(await process.stdout.readline())
            assert (first["event"], first["data"]["state"]) == ("exists", "replicating")
            await pair.primary.execute("replication-checkpoint")
            assert json.loads(await process.stdout.readline())["event"] == "REPLICATION_CHECKPOINT"
            pair.standby.kill()
            lost = json.loads(await process.stdout.readline())
            assert (lost["event"], lost["data"]["state"], lost["data"]["health"]) == (
                "REPLICATION_STATE", "offline", "at-risk")
            pair.primary.kill()
            assert await process.wait() == 3


@scenario
async def test_stop_ends_replication_and_stop_quit_the_program(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        code, said, _ = await blockstep("stop", "--qmp", tmp_path / "primary.qmp")
        assert (code, said.strip()) == (0, "replication has ended")
        code, status = await as_json("status", "--qmp", tmp_path / "primary.qmp")
        assert (code, status["state"]) == (2, "stopped")
        codes = await asyncio.gather(*(blockstep("stop", "--quit", "--qmp", tmp_path / f"{role}.qmp")
                                       for role in ("primary", "standby")))
        (code, _, said), (code2, said2, _) = codes
        assert (code, said.strip()) == (1, "blockstep: it has ended, but the standby lacks what was written last: no "
                                           "checkpoint can be taken: the pair is stopped (stopped by command)")
        assert (code2, said2) == (0, "stopping\nit has ended; its disks are at checkpoint 1\n")
        assert await pair.primary.ended() == 0
        assert await pair.standby.ended() == 0
        assert "Traceback" not in pair.primary.printed + pair.standby.printed


@scenario
async def test_when_stop_quit_of_a_primary_has_ended_its_standby_has_everything(tmp_path: Path) -> None:
    """A planned change of sides: whoever fails over next, on the other host, loses nothing, however slow the link."""
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start_standby()
        host, _, port = pair.link.rpartition(":")
        async with Proxy(host, int(port)) as proxy:
            await pair.start_primary("--max-stall", "20s", to=proxy.address)
            await pair.primary.until(health="healthy")
            proxy.delay = 0.2
            await pair.write(200)
            code, said, _ = await blockstep("stop", "--quit", "--qmp", tmp_path / "primary.qmp")
            await pair.standby.execute("replication-failover")
        assert (code, said) == (0, "stopping\nit has ended; the standby has everything, at checkpoint 2\n")
        assert await pair.proven(pair.standby) == 200
        assert await pair.primary.ended() == 0


@scenario
async def test_stop_quit_of_a_primary_says_that_its_standby_does_not_have_everything(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        pair.standby.kill()
        await pair.primary.until(state="offline")
        code, said, why = await blockstep("stop", "--quit", "--qmp", tmp_path / "primary.qmp")
        assert (code, said) == (1, "stopping\n")
        assert "the standby lacks what was written last: no checkpoint can be taken: the pair is offline (" in why
        assert await pair.primary.ended() == 0
        assert "blockstep: the standby lacks what was written last" in pair.primary.printed


@scenario
async def test_stop_quit_of_a_promoted_standby_waits_for_its_merge(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.write(100)
        pair.primary.kill()
        await pair.standby.execute("replication-failover")
        code, said, _ = await blockstep("stop", "--quit", "--qmp", tmp_path / "standby.qmp")
        assert (code, said) == (0, "stopping\nit has ended; its disks are whole\n")
        assert await pair.file("standby") == await pair.file("original")


@scenario
async def test_stop_quit_of_a_standby_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start_standby()
        code, _, why = await blockstep("stop", "--quit", "--qmp", tmp_path / "standby.qmp")
        assert (code, why) == (1, "blockstep: it has ended, but there is no checkpoint that its disks could be at\n")
        assert await pair.standby.ended() == 0


@scenario
async def test_stop_quit_of_a_program_that_dies_meanwhile_is_an_error(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start("--max-stall", "20s")
        await pair.primary.until(health="healthy")
        pair.standby.send(signal.SIGSTOP)  # the primary's last checkpoint waits for it
        command = blockstep_command("stop", "--quit", "--qmp", tmp_path / "primary.qmp")
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                                       env=environment())
        assert process.stdout
        assert await process.stdout.readline() == b"stopping\n"
        pair.primary.kill()
        _, why = await process.communicate()
        assert (process.returncode, why) == (
            3, b"blockstep: the program has ended, and not in order; its own output says why\n")


@scenario
async def test_a_pair_that_is_told_to_quit_leaves_both_disks_the_same(tmp_path: Path) -> None:
    async with Pair(tmp_path, disks=2) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        await pair.write(200)
        for side in (pair.primary, pair.standby):
            side.process.terminate()
            assert await side.ended() == 0
        for name in pair.names:
            assert (tmp_path / f"{name}.primary").read_bytes() == (tmp_path / f"{name}.standby").read_bytes()


@scenario
async def test_commands_of_one_monitor_are_answered_in_order_however_fast_they_come(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        await pair.start()
        await pair.primary.until(health="healthy")
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "primary.qmp"))
        await reader.readline()
        words = ["query-replication", "replication-checkpoint", "no-such-command", "query-replication"]
        lines = [json.dumps({"execute": "qmp_capabilities", "id": 0})]
        lines += [json.dumps({"execute": words[number % 4], "id": number}) for number in range(1, 81)]
        async with pair.writing():
            await pair.written(10)
            writer.write("".join(lines).encode())
            answers: list[dict[str, Any]] = []
            async with asyncio.timeout(10):
                while len(answers) < 81:
                    message = json.loads(await reader.readline())
                    if "event" not in message:
                        answers.append(message)
        assert [answer["id"] for answer in answers] == list(range(81))
        epochs = [answer["return"]["epoch"] for answer in answers if answer["id"] % 4 == 1]
        assert epochs == sorted(set(epochs))
        assert all(answer["error"]["class"] == "CommandNotFound" for answer in answers if answer["id"] % 4 == 2)
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("arguments", [(), ("--disks", "3", "--disk")])
@scenario
async def test_the_demo_proves_what_it_says(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    more: list[str] = list(arguments)
    if more:
        image = tmp_path / "image.raw"
        image.write_bytes(b"an image of somebody's" * 100_000)
        more.append(str(image))
    else:
        more = ["--size", "8M"]
    code, said, error = await blockstep("demo", "--checkpoints", "2", *more)
    assert code == 0, error
    assert "proven:" in said
    assert "checkpoint 2" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_demonstration_that_is_broken_off_leaves_nothing_behind(number: signal.Signals) -> None:
    words = blockstep_command("demo", "--disks", "1", "--size", "4M")
    with TemporaryDirectory() as directory, \
            started(words, env={**environment(), "TMPDIR": directory}, stdout=subprocess.PIPE) as demo:
        assert demo.stdout
        printed = iter(demo.stdout.readline, b"")
        steps = (line for line in printed if b": process " in line)
        with ExitStack() as stack:
            lives = [os.pidfd_open(int(next(steps).rpartition(b" ")[2])) for _ in range(2)]
            for life in lives:
                stack.callback(os.close, life)
            demo.send_signal(number)
            assert demo.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
            for life in lives:
                assert select.select([life], [], [], 20)[0]
        assert number == signal.SIGKILL or not os.listdir(directory)
        demo.stdout.close()


def test_a_demonstration_that_nobody_looks_at_leaves_nothing_behind(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "blockstep", "demo", "--disks", "1", "--size", "4M"], timeout=30,
                              stdout=pipe, stderr=subprocess.PIPE, env={**environment(), "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_shell_that_is_ended_by_a_signal_puts_the_terminal_back(tmp_path: Path, number: signal.Signals) -> None:
    ours, its = pty.openpty()
    try:
        before, control = termios.tcgetattr(its), tmp_path / "qmp"
        with started(blockstep_command("daemon", "--qmp", f"unix:{control}"), control, env=environment()), \
                started(blockstep_command("shell", "--socket", control), env={**environment(), "TERM": "xterm"},
                        stdin=its, stdout=its, stderr=its) as shell:
            said = b""
            while b"\x1b[?2004h" not in said:  # bracketed paste: it reads a line
                said += os.read(ours, 4096)
            assert termios.tcgetattr(its) != before
            shell.send_signal(number)
            assert shell.wait(20) == 128 + number
            assert termios.tcgetattr(its) == before
    finally:
        os.close(ours)
        os.close(its)
