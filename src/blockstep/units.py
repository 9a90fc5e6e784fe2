"""Sizes as people write and read them. Everything inside blockstep is bytes; only the border speaks units."""

from __future__ import annotations

from blockstep.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

#: Numbers that a user gives lie between these: 64 bits with a sign, as of QMP, of files and of all that QEMU takes.
LEAST: Final = -1 << 63
MOST: Final = (1 << 63) - 1

_SUFFIX: Final = {"": 1, "b": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB, "p": 1 << 50, "e": 1 << 60}
_SIZE: Final = r"(\d{1,30}(?:\.\d{1,30})?)\s*([bkmgtpe]?)(?:i?b)?"
_TIME: Final = r"(\d{1,30}(?:\.\d{1,30})?)\s*(ms|s|m|h|)"
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str, option: str = "size") -> int:
    """``"64k"``, ``"1.5 GiB"``, ``"4096"`` to bytes; suffixes are powers of 1024, as in QEMU and nbdkit.

    Raises OptionError naming ``option`` when the text is no size or not a whole number of bytes.
    """
    import re

    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if match:
        number = float(match[1]) if "." in match[1] else int(match[1])
        size = number * _SUFFIX[match[2].lower()]
        if size == int(size) and size < 1 << 63:
            return int(size)
    raise OptionError(option, text, "a size in bytes, or with one of the suffixes k, M, G, T (powers of 1024)")


def parse_duration(text: str, option: str = "time") -> float:
    """``"500ms"``, ``"5s"``, ``"2m"``, ``"5"`` to seconds. Raises OptionError naming ``option``."""
    import re

    match = re.fullmatch(_TIME, text.strip(), re.IGNORECASE)
    if match:
        return float(match[1]) * _SECONDS[match[2].lower()]
    raise OptionError(option, text, "a time in seconds, or with one of the suffixes ms, s, m, h")


def format_size(size: float) -> str:
    """Bytes for people: ``0``, ``512 B``, ``3.1 MiB``, ``40 GiB``."""
    if size < KiB:
        return f"{int(size)} B" if size else "0"
    units = iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    while size >= 1024:
        size, unit = size / 1024, next(units, "EiB")
    text = f"{size:.1f}" if size < 100 else f"{size:.0f}"
    return f"{text.removesuffix('.0')} {unit}"


def format_duration(seconds: float) -> str:
    """Seconds for people: ``0.8 ms``, ``2.1 s``, ``1m 33s``, ``2h 05m``."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}m {int(seconds) % 60:02d}s"
    return f"{int(seconds) // 3600}h {int(seconds) % 3600 // 60:02d}m"
