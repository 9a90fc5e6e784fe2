"""Verbs of jobs over QMP: both families, in the right state, in a wrong one, and for a job that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon, daemon, refused
from tests.scenarios import scenario
from tests.unit.qmp.disks import MiB, content, disks, everything

#: Verb -> the member that names the job, in block-job-VERB; more arguments; a state in which it is refused.
VERBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pause": ("device", {}, "pending"), "resume": ("device", {}, "running"), "cancel": ("device", {}, "concluded"),
    "complete": ("device", {}, "running"), "finalize": ("id", {}, "running"), "dismiss": ("id", {}, "running"),
    "set-speed": ("device", {"speed": 5}, "pending"),
}
FAMILIES = [("job", verb) for verb in VERBS if verb != "set-speed"] + [("block-job", verb) for verb in VERBS]


def line(family: str, verb: str, job: str = "job") -> tuple[str, dict[str, Any]]:
    member, more, _ = VERBS[verb]
    return f"{family}-{verb}", {member if family == "block-job" else "id": job, **more}


async def backup(d: Daemon, status: str) -> None:
    """A backup in some state: running is one that its speed limit holds."""
    await disks(d, "a", "b", size=4 * MiB)
    await d.qmp("blockdev-backup", {"job-id": "job", "device": "a", "target": "b", "sync": "full",
                                    "auto-finalize": False, "auto-dismiss": False,
                                    "speed": 1 if status == "running" else 0})
    if status != "running":
        await d.event("JOB_STATUS_CHANGE", id="job", status="pending")
    if status == "concluded":
        await d.qmp("job-finalize", {"id": "job"})


@pytest.mark.parametrize(("family", "verb"), FAMILIES)
@scenario
async def test_an_unknown_job_has_the_class_of_its_family(tmp_path: Path, family: str, verb: str) -> None:
    async with daemon(tmp_path) as d:
        with refused("GenericError" if family == "job" else "DeviceNotActive", "no such job"):
            await d.qmp(*line(family, verb))


@pytest.mark.parametrize(("family", "verb"), FAMILIES)
@scenario
async def test_a_verb_in_a_wrong_state_is_refused_and_changes_nothing(tmp_path: Path, family: str, verb: str) -> None:
    async with daemon(tmp_path) as d:
        await backup(d, VERBS[verb][2])
        before = everything(d)
        with refused(match="job 'job'"):
            await d.qmp(*line(family, verb))
        assert everything(d) == before


@pytest.mark.parametrize("family", ["job", "block-job"])
@scenario
async def test_a_job_is_paused_resumed_and_cancelled(tmp_path: Path, family: str) -> None:
    async with daemon(tmp_path) as d:
        await backup(d, "running")
        await d.qmp(*line(family, "pause"))
        await d.event("JOB_STATUS_CHANGE", id="job", status="paused")
        [shown] = await d.qmp("query-block-jobs")
        assert (shown["paused"], shown["status"], shown["device"], shown["type"]) == (True, "paused", "job", "backup")
        await d.qmp(*line(family, "resume"))
        assert [job["status"] for job in await d.qmp("query-jobs")] == ["running"]
        await d.qmp("block-job-set-speed", {"device": "job", "speed": 2})
        with refused(match="speed"):
            await d.qmp("block-job-set-speed", {"device": "job", "speed": -1})
        assert [job["speed"] for job in await d.qmp("query-block-jobs")] == [2]
        await d.qmp(*line(family, "cancel"))
        ended = await d.event("BLOCK_JOB_CANCELLED", device="job")
        assert 0 < ended["offset"] < ended["len"] == 4 * MiB
        assert [job["error"] for job in await d.qmp("query-jobs")] == ["Operation canceled"]
        await d.qmp(*line(family, "dismiss"))
        assert await d.qmp("query-jobs") == await d.qmp("query-block-jobs") == []


@scenario
async def test_a_paused_job_is_cancelled_with_force_only_by_the_older_command(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await backup(d, "running")
        await d.qmp("job-pause", {"id": "job"})
        with refused(match="paused"):
            await d.qmp("block-job-cancel", {"device": "job"})
        await d.qmp("block-job-cancel", {"device": "job", "force": True})
        await d.event("BLOCK_JOB_CANCELLED", device="job")


@pytest.mark.parametrize("family", ["job", "block-job"])
@scenario
async def test_when_finalize_answers_the_job_can_be_dismissed(tmp_path: Path, family: str) -> None:
    async with daemon(tmp_path) as d:
        await backup(d, "pending")
        await d.qmp(*line(family, "finalize"))
        await d.qmp(*line(family, "dismiss"))
        assert await content(d, "b") == b"a" * MiB
        assert [event["event"] for event in d.events if event["event"] != "JOB_STATUS_CHANGE"] == [
            "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED"]


@pytest.mark.parametrize("family", ["job", "block-job"])
@scenario
async def test_complete_puts_the_target_in_the_place_of_the_source(tmp_path: Path, family: str) -> None:
    async with daemon(tmp_path) as d:
        await disks(d, "a", "b")
        await d.qmp("blockdev-mirror", {"job-id": "job", "device": "a", "target": "b", "sync": "full"})
        await d.event("BLOCK_JOB_READY", device="job")
        await d.qmp(*line(family, "complete"))
        await d.event("JOB_STATUS_CHANGE", id="job", status="null")
        assert await content(d, "b") == b"a" * MiB


@scenario
async def test_a_job_that_copies_nothing_is_no_block_job(tmp_path: Path) -> None:
    async with daemon(tmp_path) as d:
        await d.qmp("blockdev-create", {"job-id": "job", "options": {
            "driver": "file", "filename": str(tmp_path / "new"), "size": MiB}})
        await d.event("JOB_STATUS_CHANGE", id="job", status="concluded")
        assert await d.qmp("query-block-jobs") == []
        with refused("DeviceNotActive"):
            await d.qmp("block-job-dismiss", {"id": "job"})
        await d.qmp("job-dismiss", {"id": "job"})
