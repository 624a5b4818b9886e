"""Where this machine keeps what can be made again."""

from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the user's folder for it: `$XDG_CACHE_HOME/trimtab`, or `~/.cache/trimtab`."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
