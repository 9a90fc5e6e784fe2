"""``human-monitor-command``: the few commands of QEMU's human monitor that scripts of its replication use.

    drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,...,node-name=n     as blockdev-add
    drive_add 0 if=none,id=d,file=disk.img,format=raw                                      a node named d
    drive_del NODE                                                                         as blockdev-del
    qemu-io NODE "write -P 1 0 64k"                                                        see `qemu_io`
    info block [-n] [-v] [NODE], info block-jobs, help [COMMAND]

All others are unknown commands. As in QEMU, what goes wrong is in the text and not an error of the command; lines end
with CR LF. Other than in QEMU the output of qemu-io is in the text as well: QEMU prints it on its own terminal.

Source: QEMU's COLO guide, the help texts of its monitor, and the answers of QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from typing import Annotated, Any, Final

from msgspec import UNSET, Meta

from blockstep import keyval
from blockstep.block.driver import Driver
from blockstep.errors import BlockstepError, NodeNotFound
from blockstep.inventory.filenames import filename_of
from blockstep.inventory.limits import limits_of
from blockstep.inventory.nodes import remove_node
from blockstep.qmp.commands import query_nodes
from blockstep.qmp.commands.holder import Holder
from blockstep.qmp.commands.qemu_io import qemu_io
from blockstep.qmp.schema import Arguments, Registry
from blockstep.units import format_size

commands = Registry()


class HumanArguments(Arguments):
    """Arguments of human-monitor-command."""

    command_line: Annotated[str, Meta(description="The command as a person types it.")]
    cpu_index: Annotated[int | None, Meta(description="Of no effect: there are no CPUs.")] = None


class _Complaint(BlockstepError):
    """The command makes no sense; the text says why."""


@commands.command("human-monitor-command")
async def human_monitor_command(context: Holder, args: HumanArguments) -> str:
    """Execute a command of the human monitor: drive_add, drive_del, qemu-io, info block, info block-jobs.

    Returns what it prints, complaints included.
    """
    line = args.command_line.strip()
    name, _, rest = line.partition(" ")
    if name == "info":
        word, _, rest = rest.strip().partition(" ")
        name = f"info {word}".strip()
    if not name:
        return ""
    try:
        if name == "info":
            text = "".join(f"{each} {usage}\n" for each, usage in _USAGE.items() if each.startswith("info "))
        elif name not in _COMMANDS:
            raise _Complaint(f"unknown command: '{name}'")
        else:
            text = await _COMMANDS[name](context, rest.strip())
    except (BlockstepError, OSError) as error:
        text = f"{error}\n"
    return text.replace("\n", "\r\n")


# --- words ---


def _words(command: str, line: str, options: str = "") -> tuple[set[str], list[str]]:
    """The options at the start of a line, and its words; a word in quotes may have blanks."""
    found: set[str] = set()
    words = list(_split(command, line))
    while words and words[0].startswith("-") and len(words[0]) > 1:
        word = words.pop(0)
        if any(letter not in options for letter in word[1:]):
            raise _Complaint(f"{command}: unsupported option {word}\n{_try_help(command)}")
        found.update(word[1:])
    return found, words


def _split(command: str, line: str) -> Iterator[str]:
    escapes = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
    at = 0
    while at < len(line):
        if line[at].isspace():
            at += 1
        elif line[at] == '"':
            word, at = "", at + 1
            while at < len(line) and line[at] != '"':
                if line[at] == "\\" and at + 1 < len(line):
                    if line[at + 1] not in escapes:
                        raise _Complaint(f"unsupported escape code: '\\{line[at + 1]}'")
                    word, at = word + escapes[line[at + 1]], at + 2
                else:
                    word, at = word + line[at], at + 1
            if at >= len(line):
                raise _Complaint("unterminated string")
            yield word
            at += 1
        else:
            end = next((index for index in range(at, len(line)) if line[index].isspace()), len(line))
            yield line[at:end]
            at = end


def _count(command: str, words: list[str], least: int, most: int, what: str) -> None:
    if len(words) < least:
        raise _Complaint(f"{command}: {what} expected\n{_try_help(command)}")
    if len(words) > most:
        raise _Complaint(f"{command}: extraneous characters at the end of line\n{_try_help(command)}")


def _try_help(command: str) -> str:
    return f'Try "help {"info block" if command == "block" else command}" for more information'


def _node(context: Holder, name: str) -> Driver:
    try:
        return context.inventory.graph.find(name)
    except NodeNotFound:
        raise _Complaint(f"Device '{name}' not found") from None


# --- disks ---


async def _drive_add(context: Holder, line: str) -> str:
    options, words = _words("drive_add", line, "n")
    _count("drive_add", words, 2, 2, "string")
    given = keyval.parse(words[1], "drive_add")
    if "n" in options:
        if "node-name" not in given:
            raise _Complaint("'node-name' needs to be specified")
        await context.inventory.graph.open(_with_drivers(given), strict=False)
        return ""
    await context.inventory.graph.open(_drive(context, given), strict=False)
    return "OK\n"


def _with_drivers(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the driver of what only has a filename, as QEMU takes them here."""
    whole = {name: _with_drivers(value) if isinstance(value, dict)
             else [_with_drivers(each) if isinstance(each, dict) else each for each in value]
             if isinstance(value, list) else value for name, value in options.items()}
    if "driver" not in whole and "filename" in whole:
        whole["driver"] = "file"
    elif "driver" not in whole and "file" in whole:
        whole["driver"] = "raw"
    return whole


#: Words of ``drive_add`` that say where a guest would find the drive.
_PLACE: Final = ("if", "media", "index", "bus", "unit")


def _drive(context: Holder, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the node that stands for a drive: it has the drive's id for its name."""
    options = dict(given)
    if options.get("if") != "none":
        raise _Complaint(f"Can't hot-add drive to type {options.get('if', 'ide')}: only if=none has a meaning here")
    for name in _PLACE:
        options.pop(name, None)
    nodes = context.inventory.graph.nodes
    id = options.pop("id", None) or next(name for number in count() if (name := f"none{number}") not in nodes)
    if not isinstance(id, str):
        raise _Complaint("Parameter 'id' expects an identifier")
    if id in nodes:
        raise _Complaint(f"Duplicate ID '{id}' for drive")
    options["node-name"] = id
    if isinstance(options.get("file"), str) and options["file"] not in nodes:
        options["file"] = {"filename": options["file"]}
    if "format" in options:
        options["driver"] = options.pop("format")
    if "readonly" in options:
        options["read-only"] = options.pop("readonly")
    options.setdefault("driver", "raw")
    return _with_drivers(options)


async def _drive_del(context: Holder, line: str) -> str:
    _, words = _words("drive_del", line)
    _count("drive_del", words, 1, 1, "block device name")
    await remove_node(context.inventory.graph, _node(context, words[0]))
    return ""


async def _qemu_io(context: Holder, line: str) -> str:
    _, words = _words("qemu-io", line, "d")
    _count("qemu-io", words, 2, 2, "string" if words else "block device name")
    return await qemu_io(context.inventory.graph, _node(context, words[0]), words[1])


# --- info ---


async def _info_block(context: Holder, line: str) -> str:
    options, words = _words("block", line, "nv")
    _count("block", words, 0, 1, "")
    graph = context.inventory.graph
    shown = query_nodes.disks(graph)
    if "n" in options or (words and words[0] not in {node.name for node in shown}):
        found = [node for node in reversed(graph.nodes.values()) if not words or node.name == words[0]]
        return "\n".join(_lines(context, node, "v" in options) for node in found)
    return "\n".join(_lines(context, node, "v" in options, disk=True) for node in shown
                     if not words or node.name == words[0])


def _lines(context: Holder, node: Driver, verbose: bool, disk: bool = False) -> str:
    """What people see of one node."""
    info = query_nodes.node_info(context.inventory, node)
    name = f"{node.name} ({node.name})" if disk else node.name
    text = f"{name}: {filename_of(node)} ({node.driver}{', read-only' if node.read_only else ''})\n"
    if disk:
        text += "    Removable device: not locked, tray closed\n"
    mode = "writeback" + ", direct" * info.cache.direct + ", ignore flushes" * info.cache.no_flush
    text += f"    Cache mode:       {mode}\n"
    if info.backing_file is not UNSET:
        text += f"    Backing file:     {info.backing_file} (chain depth: {info.backing_file_depth})\n"
    group = limits_of(context.inventory.graph, node)
    if group is not None:
        limits = {"bps": info.bps, "bps_rd": info.bps_rd, "bps_wr": info.bps_wr,
                  "iops": info.iops, "iops_rd": info.iops_rd, "iops_wr": info.iops_wr}
        text += "    I/O throttling:   " + " ".join(f"{name}={value}" for name, value in limits.items()) + \
            f" group={group.name}\n"
    return text + (_image(info.image) if verbose else "")


def _image(image: query_nodes.ImageInfo) -> str:
    text = "\nImages:\n"
    while True:
        text += f"image: {image.filename}\nfile format: {image.image_format}\n"
        text += f"virtual size: {format_size(image.virtual_size)} ({image.virtual_size} bytes)\n"
        if image.actual_size is not UNSET:
            text += f"disk size: {format_size(image.actual_size) if image.actual_size else '0 B'}\n"
        if image.cluster_size is not UNSET:
            text += f"cluster_size: {image.cluster_size}\n"
        if image.backing_filename is not UNSET:
            text += f"backing file: {image.backing_filename}\n"
        if image.backing_image is UNSET:
            return text
        image = image.backing_image
        text += "\n"


async def _info_block_jobs(context: Holder, line: str) -> str:
    jobs = [job for job in context.inventory.jobs.list() if job.is_block_job]
    if not jobs:
        return "No active jobs\n"
    return "".join(
        f"Type {job.kind}, device {job.id}: Completed {job.current} of {job.total} bytes, "
        f"speed limit {job.speed} bytes/s\n" for job in jobs)


async def _help(context: Holder, line: str) -> str:
    return "".join(f"{name} {usage}\n" for name, usage in _USAGE.items() if line in ("", name))


_COMMANDS: Final[dict[str, Callable[[Holder, str], Awaitable[str]]]] = {
    "drive_add": _drive_add,
    "drive_del": _drive_del,
    "help": _help,
    "info block": _info_block,
    "info block-jobs": _info_block_jobs,
    "qemu-io": _qemu_io,
}

_USAGE: Final = {
    "drive_add": "[-n] place options -- add a node; -n: with the options of blockdev-add",
    "drive_del": "node -- close a node",
    "help": "[command] -- show what there is",
    "info block": "[-n] [-v] [node] -- show disks; -n: all nodes; -v: with their images",
    "info block-jobs": "-- show block jobs",
    "qemu-io": "node \"command\" -- run a command of qemu-io on a node",
}
