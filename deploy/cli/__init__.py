"""The commands: `python -m deploy.NAME` runs the module of that name."""
