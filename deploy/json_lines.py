"""JSON on one line, whatever a reader takes for the end of a line."""

import json
from typing import Any

_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""What JSON leaves as it is in a text, and ends a line for Python's `splitlines` and other readers by lines."""


def to_line(value: Any) -> str:
    """Return a value as JSON that no reader breaks: other characters than line breaks stay as they are.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_BREAKS)
