"""Check a deploy.yaml before anything starts: `python -m deploy.check deploy.yaml`.

The first mistake is told by its path, in seconds and without loading a model. What this machine lacks is a warning,
since other nodes may have it.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml

from cluster.errors import InvalidConfiguration
from deploy.service.capacity import Machine, shortages
from deploy.service.check import check
from deploy.service.port import names_a_cluster


def main() -> None:
    """Check the file named on the command line; exit 1 with the first mistake."""
    parser = argparse.ArgumentParser(description="Check a deploy.yaml without starting anything.")
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    try:
        schema, settings = check(yaml.safe_load(file.read_text()))
        warnings = [] if names_a_cluster(os.environ) else list(shortages(schema, settings, Machine.here()))
    except (OSError, yaml.YAMLError, InvalidConfiguration) as error:
        sys.exit(f"{file}: {error}")
    for warning in warnings:
        print(f"{file}: warning: {warning}", file=sys.stderr)
    print(f"{file}: fine" if not warnings else f"{file}: fine, but for what this machine lacks")


if __name__ == "__main__":
    main()
