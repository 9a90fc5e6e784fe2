"""Of all scenarios: what the disks of a standby, and of a pair, are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.scenario.standby import Rig


@pytest.fixture(scope="module", params=["overlay", "qcow2"])
def four_disks(request: pytest.FixtureRequest) -> Iterator[str]:
    """Overlays over plain bytes or files; or a pair whose primary, secondary, hidden and active disk are all qcow2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rig, "kind", request.param)
        yield request.param
