"""Whether a file that is written is locked against other writers."""

from typing import Literal

#: ``auto``: where the filesystem can.
Locking = Literal["on", "off", "auto"]
