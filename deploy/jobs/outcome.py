"""That a job came to no good end, which its exit status tells from one that was never started."""


class BadOutcome(Exception):
    """A job ran, and what came of it is bad: the message says what, and what to do about it."""
