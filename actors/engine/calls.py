"""How the ranks of a sharded model keep their engines alike: rank 0's calls, repeated by the others.

An engine does the same with the same calls: where tokens lie in its cache follows from them alone. Only a step needs
all ranks at once, so what happens between two steps travels with the second, in one message.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from actors.engine.engine import Engine
from actors.engine.work import Work
from cluster.errors import EngineError


class CallRecord:
    """Rank 0's record of what is done to its engine, sent on with every step."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        """Record for an engine's `on_call`.

        Args:
            send: brings a message to all other ranks.
        """
        self._send = send
        self._calls: list[str] = []

    def add(self, call: str, *arguments: object) -> None:
        """Note a call of an engine; a step sends all that were noted."""
        self._calls.append(json.dumps([call, arguments], separators=(",", ":"), default=_plain))
        if call == "step":
            message = f"[{','.join(self._calls)}]"
            self._calls.clear()
            self._send(message.encode())


def _plain(value: Any) -> list[Any]:
    """Return what JSON does not know, work and sequences other than lists, as a list."""
    return [value.sequence, value.tokens, value.rows] if isinstance(value, Work) else list(value)


def repeat(engine: Engine, message: bytes) -> None:
    """Do to an engine what was done to rank 0's."""
    for call, arguments in json.loads(message):
        # Rank 0's caller has the same error, and nothing has changed there either.
        with suppress(EngineError):
            _repeat(engine, call, arguments)


def _repeat(engine: Engine, call: str, arguments: list[Any]) -> None:
    match call:
        case "open":
            engine.open(*arguments)
        case "reuse":
            engine.reuse(*arguments)
        case "reserve":
            engine.reserve(*arguments)
        case "step":
            engine.step([Work(*item) for item in arguments[0]])
        case "truncate":
            engine.truncate(*arguments)
        case "close":
            engine.close(*arguments)
        case _:
            raise AssertionError(f"rank 0 made a call {call!r}")
