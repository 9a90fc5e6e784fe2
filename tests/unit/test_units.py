"""Sizes and times, as typed and as shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstep.errors import OptionError
from blockstep.units import GiB, KiB, MiB, TiB, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(("text", "size"), [
    ("0", 0), ("4096", 4096), ("512b", 512), ("64k", 64 * KiB), ("64K", 64 * KiB), ("64kB", 64 * KiB),
    ("64KiB", 64 * KiB), ("1.5 GiB", 3 * GiB // 2), (" 2M ", 2 * MiB), ("1T", TiB), ("0.5k", 512),
    ("1P", 1 << 50), ("7E", 7 << 60),
])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [
    "", "k", "-1", "1.3", "1x", "1 2", "1e3", "0x10", "8E", "0.0001k", "nan", "1..5k",
])
def test_what_is_no_size_is_refused_and_the_option_named(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_size(text, "buffer-limit")
    assert caught.value.option == "buffer-limit"
    assert caught.value.value == text
    assert "buffer-limit" in str(caught.value)


@given(st.integers(0, (1 << 63) - 1))
def test_every_number_of_bytes_is_a_size(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(0, (1 << 20) - 1), st.sampled_from("kKmMgGtT"))
def test_suffixes_are_powers_of_1024(count: int, suffix: str) -> None:
    assert parse_size(f"{count}{suffix}") == count << {"k": 10, "m": 20, "g": 30, "t": 40}[suffix.lower()]


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_option_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) < 1 << 63
    except OptionError:
        pass


@pytest.mark.parametrize(("text", "seconds"), [
    ("5", 5.0), ("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0), ("1.5 s", 1.5),
    ("0", 0.0), ("3MS", 0.003),
])
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1m30s", "inf"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="max-stall"):
        parse_duration(text, "max-stall")


@pytest.mark.parametrize(("size", "text"), [
    (0, "0"), (512, "512 B"), (KiB, "1 KiB"), (3.1 * MiB, "3.1 MiB"), (40 * GiB, "40 GiB"),
    (200 * GiB, "200 GiB"),
    (1536 * GiB, "1.5 TiB"), (3 << 60, "3 EiB"),
])
def test_sizes_are_shown_short(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 ms"), (0.0008, "0.8 ms"), (0.0421, "42.1 ms"), (2.1, "2.1 s"), (93, "1m 33s"), (7500, "2h 05m"),
])
def test_times_are_shown_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 1 << 60))
def test_a_shown_size_reads_back_as_nearly_the_same(size: int) -> None:
    shown = format_size(size)
    number, _, unit = shown.partition(" ")
    factors = {"": 1, "B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB, "PiB": 1 << 50, "EiB": 1 << 60}
    assert float(number) * factors[unit] == pytest.approx(size, rel=0.06)
