"""Where the programs of a host put what others look for, unless the user says otherwise: sockets, and lasting state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

#: Of control sockets, in the runtime directory.
QMP_SUFFIX: Final = ".qmp"
#: Of the notes of promotions, in the state directory.
STATE_SUFFIX: Final = ".promoted"
#: Of the notes of ends in good order, there as well.
ENDED_SUFFIX: Final = ".ended"
#: Of the notes of whom a standby follows, there as well.
FOLLOWS_SUFFIX: Final = ".follows"
#: Of what standbys lack, in the runtime directory.
LACKS_SUFFIX: Final = ".lacks"


def runtime_directory() -> Path:
    """Where sockets go.

    ``$RUNTIME_DIRECTORY`` (systemd), ``/run/blockstep`` for root, ``$XDG_RUNTIME_DIR/blockstep``, or
    ``/tmp/blockstep-UID``: the first that applies.
    """
    if directory := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(directory.split(":")[0])
    if os.geteuid() == 0:  # also in a login session: the units of systemd are in the same place
        return Path("/run/blockstep")
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(directory) / "blockstep"
    return Path(f"/tmp/blockstep-{os.geteuid()}")


def state_directory() -> Path:
    """Where state goes that outlives a reboot.

    ``$STATE_DIRECTORY`` (systemd), ``/var/lib/blockstep`` for root, ``$XDG_STATE_HOME/blockstep`` or
    ``~/.local/state/blockstep``: the first that applies.
    """
    if directory := os.environ.get("STATE_DIRECTORY"):
        return Path(directory.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/blockstep")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "blockstep"
