"""What may be a name in a graph: of nodes, jobs and other things that commands speak of.

Source: QEMU's rule for identifiers, so that a name that is good here is good there.
"""

from __future__ import annotations

import re
from typing import Final

from blockstep.errors import OptionError

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def check_name(option: str, name: str) -> str:
    """``name`` itself. Raises OptionError, naming ``option``, if it is no name."""
    if not _NAME.fullmatch(name):
        raise OptionError(option, name, "letters, digits, '-', '.' and '_', beginning with a letter")
    return name
