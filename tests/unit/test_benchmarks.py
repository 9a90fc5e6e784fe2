"""The bench itself: verdicts, the choice of rows, and a contestant that fails while the others go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import measures, servers, tools
from benchmarks.__main__ import chosen, measure
from benchmarks.measures import Bench, Measured, Race
from benchmarks.report import as_json, verdicts
from benchmarks.rows import ROWS, WRITE_4K, Row, Target


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, tmp_path, size=1 << 20, rounds=3, seconds=1)


@pytest.mark.parametrize(("target", "score", "verdict"), [
    (Target(1.0, 1.3), 0.99, "MISS"), (Target(1.0, 1.3), 1.0, "held"), (Target(1.0, 1.3), 1.3, "aim"),
    (Target(5, 1, "ms", lower=True), 5.1, "MISS"), (Target(5, 1, "ms", lower=True), 5, "held"),
    (Target(5, 1, "ms", lower=True), 1, "aim"),
])
def test_a_score_is_held_against_both_targets(target: Target, score: float, verdict: str) -> None:
    assert target.verdict(score) == verdict


def test_rows_have_names_of_their_own_and_sound_targets() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        for target in row.targets.values():
            assert target.aim <= target.at_least if target.lower else target.aim >= target.at_least


def test_rows_are_chosen_by_beginning_or_pattern() -> None:
    assert [row.name for row in chosen(["plain-1m"])] == ["plain-1m-read", "plain-1m-write"]
    assert all(row.name.endswith("depth1") for row in chosen(["*-depth1"]))
    assert chosen([]) == ROWS
    with pytest.raises(SystemExit, match="plain-4k-read"):
        chosen(["no-such-row"])


def racing(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, list[float]]) -> list[str]:
    """Contestants that are no processes: each run of fio takes the next of its speeds. Returns who ran."""
    ran: list[str] = []

    def contestant(name: str) -> object:
        @contextmanager
        def start(directory: Path, size: int) -> Iterator[servers.Endpoint]:
            if not speeds[name]:
                raise FileNotFoundError(f"{name} is not installed")
            yield servers.Endpoint(Path(name))
        return start

    def fio(uri: str, *_: object, **__: object) -> float:
        name = uri.rpartition("=")[2]
        ran.append(name)
        return speeds[name].pop(0)

    monkeypatch.setattr(measures, "CONTESTANTS", {name: contestant(name) for name in speeds})
    monkeypatch.setattr(measures, "fio", fio)
    return ran


def test_contestants_take_turns_and_medians_are_compared_with_the_best(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = racing(monkeypatch, {"ours": [90, 120, 9999], "slow": [10, 10, 10], "fast": [100, 1, 100]})
    measured = Race("ours", ("slow", "fast"), WRITE_4K)(bench)
    assert ran == ["ours", "slow", "fast"] * 3
    assert measured.scores == {"ratio": 1.2}
    assert measured.errors == {}


def test_one_that_does_not_start_is_an_error_and_the_others_go_on(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    racing(monkeypatch, {"ours": [], "rival": [10, 20, 30]})
    race = Race("ours", ("rival",), WRITE_4K)
    row = Row("row", "a row", race, {"ratio": Target(1, 2)})
    measured = measure(row, bench)
    assert measured.errors == {"ours": "ours is not installed"}
    assert measured.samples == {"rival": [10, 20, 30]}
    assert verdicts(row, measured) == [("ratio", "", "error")]
    assert as_json(bench, [(row, measured)])["rows"][0]["errors"] == measured.errors


def test_one_that_breaks_on_the_way_runs_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = racing(monkeypatch, {"ours": [10, 20, 30], "rival": [10]})
    measured = Race("ours", ("rival",), WRITE_4K)(bench)
    assert ran == ["ours", "rival", "ours", "rival", "ours"]
    assert "rival" in measured.errors


def test_a_ratio_needs_all_rivals(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    racing(monkeypatch, {"ours": [10, 20, 30], "rival": [10, 10, 10], "absent": []})
    assert Race("ours", ("rival", "absent"), WRITE_4K)(bench).scores == {}


def test_a_measure_that_breaks_is_the_result_of_its_row(bench: Bench) -> None:
    def breaks(_: Bench) -> Measured:
        raise OSError(28, "no room")

    measured = measure(Row("row", "a row", breaks, {"ratio": Target(1, 2)}), bench)
    assert "no room" in measured.errors["row"]


def test_disks_are_alike_in_every_call_and_sparse_where_asked(tmp_path: Path) -> None:
    one = tools.make_disk(tmp_path / "one", 2 << 20)
    two = tools.make_disk(tmp_path / "two", 2 << 20)
    assert one.read_bytes() == two.read_bytes() != bytes(2 << 20)
    holes = tools.make_sparse(tmp_path / "holes", 4 << 20, [(1 << 20, 1 << 20)])
    assert holes.read_bytes()[:1 << 20] == bytes(1 << 20)
    assert holes.stat().st_blocks * 512 < 2 << 20
