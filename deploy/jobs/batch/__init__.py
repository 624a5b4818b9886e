"""The files of a batch: its lines and its results."""
