"""The command line: `trimtab NAME` runs `NAME.py`, as `options/NAME.py` reads what it is told."""
