"""Rows as tensors and as bytes, and the count of what has travelled.

Shape legend: R rows, W elements of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What every row of a stream looks like."""

    dtype: torch.dtype
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    def check(self, rows_RW: Tensor) -> None:
        """Raise ValueError unless the tensor holds rows of this format."""
        if rows_RW.dim() != 2 or rows_RW.shape[1] != self.width or rows_RW.dtype != self.dtype:
            raise ValueError(
                f"rows of shape {list(rows_RW.shape)} and {rows_RW.dtype}; the stream carries "
                f"[R, {self.width}] and {self.dtype}"
            )

    def encode(self, rows_RW: Tensor) -> memoryview:
        """The rows' bytes, one row after the other; of the tensor itself if it lies so in the processor's memory."""
        if rows_RW.numel() == 0:
            return memoryview(b"")
        return rows_RW.detach().cpu().contiguous().view(torch.uint8).view(-1).numpy().data


class IncomingRows:
    """Rows that arrive as bytes, in pieces, and are put together in memory of their own."""

    def __init__(self, row_format: RowFormat, max_rows: int) -> None:
        self._row_format = row_format
        self._rows_RW = torch.empty(max_rows, row_format.width, dtype=row_format.dtype)
        self._buffer = self._rows_RW.view(torch.uint8).view(-1).numpy()
        self._num_bytes = 0

    def add(self, piece: bytes) -> None:
        """Take the next piece.

        Raises ValueError: there are more bytes than there may be rows.
        """
        end = self._num_bytes + len(piece)
        if end > self._buffer.size:
            raise ValueError(f"{end} bytes of rows, of which there may be {self._buffer.size}")
        self._buffer[self._num_bytes : end] = np.frombuffer(piece, np.uint8)
        self._num_bytes = end

    def finish(self, num_rows: int) -> Tensor:
        """[R, W]: all that has arrived.

        Raises ValueError: the number of bytes is not that of so many rows.
        """
        if self._num_bytes != num_rows * self._row_format.row_bytes:
            raise ValueError(f"{self._num_bytes} bytes for {num_rows} rows of {self._row_format.row_bytes} bytes")
        return self._rows_RW[:num_rows]


@dataclass(slots=True)
class Traffic:
    """Steps answered and bytes of rows, by their way."""

    num_steps_shared_memory: int = 0
    num_steps_inline: int = 0
    shared_memory_bytes: int = 0
    inline_bytes: int = 0

    def count(self, num_bytes: int, *, in_slot: bool) -> None:
        """Count one answered step."""
        if in_slot:
            self.num_steps_shared_memory += 1
            self.shared_memory_bytes += num_bytes
        else:
            self.num_steps_inline += 1
            self.inline_bytes += num_bytes
