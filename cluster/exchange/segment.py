"""Shared memory between a replica and a coordinator: one file, mapped by both.

`Segment` is the replica's side and `SightedSegment` the coordinator's; `Slots` is what both have of it in the end.
The first page holds a nonce, the slots follow. The file's name exists only until the coordinator has said whether it
sees it. Its maker holds a lock on it meanwhile, so a file without a lock belongs to nobody alive: `sweep` removes it.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cluster.exchange.rows import RowFormat

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "trimtab-"

NONCE_BYTES = 32
PAGE_BYTES = 4096


class Unavailable(Exception):
    """Shared memory cannot be had here; the message says why. Rows can still travel inline."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the slots of a segment lie."""

    num_slots: int
    slot_bytes: int
    first_slot: int = PAGE_BYTES

    @classmethod
    def of(cls, row_format: RowFormat, *, max_rows: int, num_slots: int) -> Self:
        """Slots of whole pages that hold `max_rows` rows each."""
        return cls(num_slots, -(-max_rows * row_format.row_bytes // PAGE_BYTES) * PAGE_BYTES)

    @property
    def segment_bytes(self) -> int:
        """Size of the whole file."""
        return self.first_slot + self.num_slots * self.slot_bytes


class Slots:
    """The mapped slots of a segment. The mapping lives as long as this object or any tensor of it does."""

    def __init__(self, descriptor: int, layout: Layout, row_format: RowFormat) -> None:
        self.layout = layout
        self._row_format = row_format
        self._mapping = mmap.mmap(descriptor, layout.segment_bytes)

    def rows(self, slot: int, num_rows: int) -> Tensor:
        """[R, W] of the first rows of a slot, at least one; a view of the shared memory."""
        rows = torch.frombuffer(
            self._mapping,
            dtype=self._row_format.dtype,
            count=num_rows * self._row_format.width,
            offset=self.layout.first_slot + slot * self.layout.slot_bytes,
        )
        return rows.view(num_rows, self._row_format.width)

    def write(self, slot: int, rows: memoryview) -> None:
        """Write the bytes of rows into a slot; in this thread alone, whatever torch's threads are."""
        start = self.layout.first_slot + slot * self.layout.slot_bytes
        self._mapping[start : start + len(rows)] = rows

    def fits(self, num_rows: int) -> bool:
        """Whether so many rows fit into one slot."""
        return num_rows * self._row_format.row_bytes <= self.layout.slot_bytes


class Segment:
    """A segment in the hands of the replica that made it, until `withdraw`."""

    def __init__(self, directory: Path) -> None:
        """Make the file, of one page, locked.

        Raises Unavailable: the directory takes no files.
        """
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            self.path, self._descriptor = _create_locked(directory)
        except OSError as error:
            raise Unavailable(f"no file can be made in {directory}: {error.strerror}") from error
        try:
            os.posix_fallocate(self._descriptor, 0, PAGE_BYTES)
            os.pwrite(self._descriptor, self.nonce, 0)
        except OSError as error:
            self.withdraw()
            raise Unavailable(f"{directory} is full: {error.strerror}") from error

    def allocate(self, layout: Layout, row_format: RowFormat) -> Slots:
        """Give the file its slots and map it.

        Raises Unavailable: there is not so much memory. It is taken here and now, for a page that turns out to be
        missing when it is written would end the process with SIGBUS.
        """
        try:
            os.posix_fallocate(self._descriptor, 0, layout.segment_bytes)
            return Slots(self._descriptor, layout, row_format)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "out of range"
            raise Unavailable(f"{self.path.parent} cannot hold {layout.segment_bytes:,} bytes: {reason}") from error

    def withdraw(self) -> None:
        """Remove the file's name; slots that are mapped stay."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


class SightedSegment:
    """A replica's segment as a coordinator sees it, until `close`."""

    def __init__(self, path: str, directory: Path) -> None:
        """Open the file and read its nonce.

        Raises Unavailable: there is no such file here, or it is not a segment.
        """
        if Path(path).parent != directory or not Path(path).name.startswith(PREFIX):
            raise Unavailable(f"{path} is not a segment in {directory}")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Unavailable(f"the replica's segment {path} cannot be opened here: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise Unavailable(f"{path} is not a regular file")
        self.nonce = os.pread(self._descriptor, NONCE_BYTES, 0)

    def map(self, layout: Layout, row_format: RowFormat) -> Slots:
        """Map the slots.

        Raises Unavailable: the file is smaller than they are, or cannot be mapped.
        """
        size = os.fstat(self._descriptor).st_size
        if size < layout.segment_bytes:
            raise Unavailable(f"the replica's segment has {size:,} bytes instead of {layout.segment_bytes:,}")
        try:
            return Slots(self._descriptor, layout, row_format)
        except OSError as error:
            raise Unavailable(f"the replica's segment cannot be mapped: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; slots that are mapped stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sweep(directory: Path = SHARED_MEMORY) -> list[Path]:
    """Remove the segments whose makers died before they could; returns their paths."""
    removed = []
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, another user's, or locked: its maker lives
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def _create_locked(directory: Path) -> tuple[Path, int]:
    """A new file that its maker holds a lock on: its path and descriptor."""
    while True:
        path = directory / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # A sweep in the moment before the lock was taken has removed the name: then once more.
            if os.fstat(descriptor).st_nlink > 0:
                return path, descriptor
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)
