"""API keys: what a file of them holds, and finding the key that a client shows.

A key is `trimtab-` and 256 random bits. The file keeps its SHA-256 only: there is nothing to guess about so many random
bits, so that a hash made to be slow would only cost time with every request. In YAML or JSON:

    keys:
      - name: alice
        sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        max_sequences: 8            # open requests, at most; optional
        tokens_per_minute: 10000    # prompts and answers together; optional

`trimtab keys` writes it.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from actors.settings import START, Name, SecuritySettings, Settings
from cluster.errors import InvalidConfiguration

KEYS_VARIABLE = "TRIMTAB_KEYS"
"""May hold the text of a file of keys."""

PREFIX = "trimtab-"
KEY_BYTES = 32
MAX_KEY_CHARS = 256
LOOK_EVERY_S = 1.0
"""How often at most the file is looked at for changes."""

logger = logging.getLogger(__name__)


class Key(Settings):
    """One key and what it may use."""

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    max_sequences: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


class Keys(Settings):
    """A file of keys."""

    keys: list[Key]

    @model_validator(mode="after")
    def _are_different(self) -> "Keys":
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {field}")
        return self


def new_key() -> str:
    """Return a key that nobody has."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest(key: str) -> str:
    """Return what a file keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str, source: str) -> Keys:
    """Return the keys in a file's text.

    Raises:
        InvalidConfiguration: it holds no keys; the message quotes nothing of it.
    """
    try:
        return Keys.model_validate(yaml.safe_load(text))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InvalidConfiguration(f"{source}: not YAML{line}: {error.problem}") from None
    except yaml.YAMLError:
        raise InvalidConfiguration(f"{source}: not YAML") from None
    except RecursionError:
        raise InvalidConfiguration(f"{source}: nested too deeply") from None
    except ValidationError as error:
        complaint = error.errors(include_input=False)[0]
        path = ".".join(map(str, complaint["loc"])) or "the file"
        raise InvalidConfiguration(f"{source}: {path}: {complaint['msg']}; write it with `trimtab keys`") from None


class KeyRing:
    """The keys that are valid now: those of a file, looked at again when it changes, or those of a text."""

    def __init__(self, keys: Keys, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._file = file
        self._clock = clock
        self._looked_at = clock()
        self._stamp = None if file is None else _stamp(file)

    @classmethod
    def load(cls, settings: SecuritySettings, environment: Mapping[str, str]) -> "KeyRing | None":
        """Return the keys that the settings or the environment name; none if neither does.

        Raises:
            InvalidConfiguration: both do, or the keys cannot be read.
        """
        text = environment.get(KEYS_VARIABLE)
        if settings.keys_file is None:
            return None if text is None else cls(parse_keys(text, KEYS_VARIABLE))
        if text is not None:
            raise InvalidConfiguration(f"security.keys_file and {KEYS_VARIABLE} both name keys; use one of them")
        return cls.of_file(locate_keys(settings.keys_file))

    @classmethod
    def of_file(cls, file: Path, clock: Callable[[], float] = time.monotonic) -> "KeyRing":
        """Return the keys of a file.

        Raises:
            InvalidConfiguration: it cannot be read.
        """
        return cls(_read(file), file, clock)

    def find(self, shown: str) -> Key | None:
        """Return the key that a client shows, in the same time whichever it is."""
        self._look()
        if len(shown) > MAX_KEY_CHARS or not shown.isascii():
            return None
        wanted, found = digest(shown), None
        for key in self._keys.keys:
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found

    def _look(self) -> None:
        """Read the file again if it has changed; a broken one leaves the keys as they are."""
        if self._file is None or self._clock() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = self._clock()
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._file)
            logger.info("read %d API keys from %s", len(self._keys.keys), self._file)
        except InvalidConfiguration as error:
            logger.error("the API keys stay as they were: %s", error)


def locate_keys(path: str) -> Path:
    """Return the absolute path of a file of keys."""
    return START / Path(path).expanduser()


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(file: Path) -> Keys:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidConfiguration(
            f"security.keys_file: {file} cannot be read: {reason}; make it with `trimtab keys new`"
        ) from None
    return parse_keys(text, str(file))
