"""The output of a batch: a result a line, written at once, and taken up again by the next run.

A result names its line of the input and the digest of the request that stood there.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from cluster.errors import InvalidConfiguration
from deploy.jobs.batch.lines import Line, Pending, to_json

RESULT_START = b'{"line": '


class ResultFile:
    """The output: one run at a time writes it, line by line, and the next takes up what it holds.

    Raises:
        InvalidConfiguration: another run writes this file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Held to the end, also when another file takes its place: it carries the lock.
        self._found = path.open("ab+")
        self._file: IO[bytes] = self._found
        try:
            _lock(self._found, path)
        except InvalidConfiguration:
            self._found.close()
            raise

    def resume(self, pending: Pending, *, redo_changed: bool) -> int:
        """Keep the results that are still good and return their number; all others are cut out.

        Cut out are failures, a last line that was half written, and, if `redo_changed`, results of other requests.

        Raises:
            InvalidConfiguration: the file holds something that no batch wrote, or results of other requests.
        """
        self._found.seek(0)
        draft = self._path.with_name(f".{self._path.name}.resumed")
        num_kept, file = 0, draft.open("wb")
        try:
            for number, raw in enumerate(self._found, 1):
                if self._is_good(raw, number, pending, redo_changed):
                    file.write(raw)
                    num_kept += 1
            _lock(file, draft)
            file.flush()
            os.fsync(file.fileno())
            draft.replace(self._path)
        except BaseException:
            file.close()
            draft.unlink()
            raise
        self._file = file
        return num_kept

    def _is_good(self, raw: bytes, number: int, pending: Pending, redo_changed: bool) -> bool:
        if not raw.endswith(b"\n") and raw.startswith(RESULT_START[: len(raw)]):
            return False
        try:
            result = json.loads(raw)
            line, digest, has_failed = int(result["line"]), result["digest"], "error" in result
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidConfiguration(
                f"{self._path}:{number} is no result of a batch; nothing was changed, give another --output"
            ) from error
        if has_failed:
            return False
        if pending.settle(line, digest):
            return True
        if not redo_changed:
            raise InvalidConfiguration(
                f"{self._path}:{number} is the result of another request than line {line} of the input is now; nothing "
                "was changed. Give the input and options of the first run, or another --output, or --redo-changed "
                "to drop such results and do their lines again"
            )
        return False

    def append(self, line: Line, outcome: Mapping[str, Any]) -> None:
        """Record what became of a line, at once."""
        result = {"line": line.number, "digest": line.digest, "id": line.id, **line.fields, **outcome}
        self._file.write(to_json(result) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let the next run have it."""
        self._file.close()
        self._found.close()


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_current = False
    # A file that was replaced while we opened it is free, but no longer the output.
    if not is_current:
        raise InvalidConfiguration(f"another run is writing {path}; wait for it or give another --output")
