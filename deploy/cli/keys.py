"""Makes, lists and revokes the API keys in a file: `python -m deploy.keys new --name alice --file keys.yaml`.

A new key is printed once; the file keeps its hash (`deploy.http.access.keys`). A running service takes the file's
changes within a second or two.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from cluster.errors import InvalidConfiguration
from deploy.http.access.keys import Key, Keys, digest, new_key, parse_keys


def read(file: Path) -> Keys:
    """Return a file's keys; none if there is no such file.

    Raises:
        InvalidConfiguration: the file holds something else.
    """
    return parse_keys(file.read_text(), str(file)) if file.exists() else Keys(keys=[])


def write(file: Path, keys: Sequence[Key]) -> None:
    """Put keys into a file, at once and for its owner's eyes only."""
    text = yaml.safe_dump({"keys": [key.model_dump(exclude_none=True) for key in keys]}, sort_keys=False)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}-", delete=False) as whole:
        try:
            whole.write(text)
            whole.close()
            os.replace(whole.name, file)
        except BaseException:
            os.unlink(whole.name)
            raise


def add(file: Path, name: str, *, max_sequences: int | None = None, tokens_per_minute: int | None = None) -> str:
    """Add a key and return it.

    Raises:
        InvalidConfiguration: the name is taken, or the file holds something else.
        ValueError: a limit or the name is impossible.
    """
    keys = read(file).keys
    if name in {key.name for key in keys}:
        raise InvalidConfiguration(f"there is a key {name!r} already; revoke it first, or choose another name")
    secret = new_key()
    key = Key(name=name, sha256=digest(secret), max_sequences=max_sequences, tokens_per_minute=tokens_per_minute)
    write(file, [*keys, key])
    return secret


def revoke(file: Path, name: str) -> None:
    """Take a key away.

    Raises:
        InvalidConfiguration: there is none of that name, or the file holds something else.
    """
    keys = read(file).keys
    if name not in {key.name for key in keys}:
        raise InvalidConfiguration(f"there is no key {name!r} in {file}")
    write(file, [key for key in keys if key.name != name])


def _describe(key: Key) -> str:
    limits = []
    if key.max_sequences is not None:
        limits.append(f"{key.max_sequences} sequences")
    if key.tokens_per_minute is not None:
        limits.append(f"{key.tokens_per_minute} tokens a minute")
    return f"{key.name}: {', '.join(limits) or 'no limits'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; exit 1 with what is wrong."""
    parser = argparse.ArgumentParser(description="The API keys of a service.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a key; it is printed once")
    listing = commands.add_parser("list", help="the names and limits of all keys")
    revoking = commands.add_parser("revoke", help="take a key away")
    for command in (new, listing, revoking):
        command.add_argument("--file", type=Path, required=True)
    for command in (new, revoking):
        command.add_argument("--name", required=True)
    new.add_argument("--max-sequences", type=int, help="open requests, at most")
    new.add_argument("--tokens-per-minute", type=int, help="prompts and answers together")
    options = parser.parse_args(arguments)
    try:
        if options.command == "new":
            limits = {"max_sequences": options.max_sequences, "tokens_per_minute": options.tokens_per_minute}
            print(add(options.file, options.name, **limits))
        elif options.command == "revoke":
            revoke(options.file, options.name)
        else:
            for key in read(options.file).keys:
                print(_describe(key))
    except (OSError, ValueError, InvalidConfiguration) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
