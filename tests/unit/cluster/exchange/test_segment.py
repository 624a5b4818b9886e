"""Segments: made, seen, swept."""

import fcntl
import os
import stat
from pathlib import Path

import pytest
import torch

from cluster.exchange.rows import RowFormat
from cluster.exchange.segment import PAGE_BYTES, PREFIX, Layout, Segment, SightedSegment, Unavailable, sweep

FORMAT = RowFormat(torch.bfloat16, 101)
LAYOUT = Layout.of(FORMAT, max_rows=30, num_slots=3)


def test_slots_are_whole_pages() -> None:
    assert Layout(3, 2 * PAGE_BYTES) == LAYOUT
    assert LAYOUT.segment_bytes == 7 * PAGE_BYTES


def test_what_one_writes_the_other_reads_though_the_name_is_gone(tmp_path: Path) -> None:
    segment = Segment(tmp_path)
    sighted = SightedSegment(str(segment.path), tmp_path)
    assert sighted.nonce == segment.nonce
    assert stat.S_IMODE(segment.path.stat().st_mode) == 0o600
    written = segment.allocate(LAYOUT, FORMAT)
    segment.withdraw()
    assert not list(tmp_path.iterdir())
    read = sighted.map(LAYOUT, FORMAT)
    sighted.close()
    for slot in range(3):
        written.rows(slot, 30).copy_(torch.full((30, 101), slot + 1))
    for slot in range(3):
        assert torch.equal(read.rows(slot, 30), torch.full((30, 101), slot + 1, dtype=torch.bfloat16))
    assert read.fits(40)
    assert not read.fits(41)


def test_a_segment_without_its_slots_is_not_mapped(tmp_path: Path) -> None:
    segment = Segment(tmp_path)
    sighted = SightedSegment(str(segment.path), tmp_path)
    with pytest.raises(Unavailable, match=r"4,096 bytes instead of 28,672"):
        sighted.map(LAYOUT, FORMAT)
    sighted.close()
    segment.withdraw()


def test_only_segments_are_opened(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("private")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / f"{PREFIX}fifo")
    for path in ("other", f"{PREFIX}link", f"{PREFIX}fifo", f"{PREFIX}none", f"../{PREFIX}x", f"{PREFIX}x/../other"):
        with pytest.raises(Unavailable):
            SightedSegment(str(tmp_path / path), tmp_path)


def test_a_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    dead = tmp_path / f"{PREFIX}1-dead"
    dead.write_bytes(b"")
    (tmp_path / "other").write_bytes(b"")
    living = Segment(tmp_path)
    assert sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([living.path, tmp_path / "other"])
    living.withdraw()
    assert sweep(tmp_path / "none") == []


def test_a_sweep_between_making_and_locking_costs_only_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    swept: list[list[Path]] = []

    def sweep_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        swept.append(sweep(tmp_path))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    segment = Segment(tmp_path)
    assert len(swept[0]) == 1
    assert list(tmp_path.iterdir()) == [segment.path]
    segment.withdraw()
