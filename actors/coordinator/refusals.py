"""What Serve's log says of a request that was refused: one line, and nothing of what was in it.

Serve logs every error of a call with its traceback. For a caller's own mistake that buries the real failures, and the
message may quote the request.
"""

import logging

from cluster.errors import InvalidRequest, Overloaded

SERVE_LOGGER = "ray.serve"


class Refusals(logging.Filter):
    """Takes the traceback and the text off refusals."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change a record that tells of a refusal (logging); all pass."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, InvalidRequest | Overloaded):
            field = getattr(error, "field", None)
            # A field that is not known is the caller's own text.
            named = f", {field}" if field is not None and field.isidentifier() and len(field) <= 32 else ""
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "refused a request: %s%s", (type(error).__name__, named)
            record.exc_info = record.exc_text = None
        return True


def log_refusals_briefly() -> None:
    """Have Serve's logger of this process say no more than that; doing so again changes nothing."""
    logger = logging.getLogger(SERVE_LOGGER)
    if not any(isinstance(known, Refusals) for known in logger.filters):
        logger.addFilter(Refusals())
