"""An image that is open for one command, and how that ends."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from blockstep.drivers.file import File
from blockstep.errors import told
from blockstep.images.opened import ImageName, opened
from tests.scenarios import scenario
from tests.unit.images.support import raw


@scenario
async def test_what_went_wrong_first_is_told_and_then_that_it_cannot_be_closed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, close = raw(tmp_path / "disk", 4096), File.close

    async def fail(node: File) -> None:
        await close(node)
        raise OSError(errno.EIO, "it cannot be closed")

    monkeypatch.setattr(File, "close", fail)
    with pytest.raises(OSError, match="no room") as caught:
        async with opened(ImageName(str(path), "raw"), writable=True):
            raise OSError(errno.ENOSPC, "no room")
    assert told(caught.value) == "no room; and then: it cannot be closed"
    with pytest.raises(OSError, match="it cannot be closed"):
        async with opened(ImageName(str(path), "raw"), writable=True):
            pass
