"""Models as the engine takes them: loaded, looked at, verified, sliced, and known again."""
