"""How people reach it: Serve applications, HTTP, the Python client, commands, and jobs."""

from pathlib import Path

# `python -m deploy.train` runs `deploy/cli/train.py`.
__path__.append(str(Path(__file__).parent / "cli"))
