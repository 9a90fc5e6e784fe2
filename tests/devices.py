"""Block devices for tests: loop devices over files. Only root has them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blockstep.units import MiB


def loop_device(image: Path) -> Path:
    """A loop device over the image, or a skip where there are none."""
    image.write_bytes(bytes(MiB))
    try:
        made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    return Path(made.stdout.strip())


def release(device: Path) -> None:
    """Give a loop device back as it was: it would stay read-only."""
    subprocess.run(["blockdev", "--setrw", device], check=True)
    subprocess.run(["losetup", "-d", device], check=True)
