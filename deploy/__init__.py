"""How people reach it: Serve applications, HTTP, the Python client, commands, and jobs."""

from pathlib import Path

# For one release more `python -m deploy.train` runs `deploy/cli/train.py`, which names `trimtab train`.
__path__.append(str(Path(__file__).parent / "cli"))
