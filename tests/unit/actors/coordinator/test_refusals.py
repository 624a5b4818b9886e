"""A refused request leaves one line in the log, without what was in it; a failure keeps its traceback."""

import logging
from collections.abc import Iterator

import pytest

from actors.coordinator.refusals import SERVE_LOGGER, log_refusals_briefly
from cluster.errors import InvalidRequest, Overloaded, ReplicaLost


@pytest.fixture
def logger(caplog: pytest.LogCaptureFixture) -> Iterator[logging.Logger]:
    logger = logging.getLogger(SERVE_LOGGER)
    filters, propagate = list(logger.filters), logger.propagate
    log_refusals_briefly()
    log_refusals_briefly()
    caplog.set_level(logging.INFO, logger=SERVE_LOGGER)
    logger.addHandler(caplog.handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(caplog.handler)
    logger.filters, logger.propagate = filters, propagate


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InvalidRequest("prompt: not 'my secret'", "prompt"), "refused a request: InvalidRequest, prompt"),
        (InvalidRequest("my secret", "my secret"), "refused a request: InvalidRequest"),
        (Overloaded("my secret"), "refused a request: Overloaded"),
    ],
)
def test_a_refusal_is_one_line(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture, error: Exception, line: str
) -> None:
    try:
        raise error
    except Exception:
        logger.exception("Request failed.")
    (record,) = caplog.records
    assert (record.getMessage(), record.levelname) == (line, "INFO")
    assert "Traceback" not in caplog.text
    assert "secret" not in caplog.text


def test_a_failure_keeps_its_traceback(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ReplicaLost("gone")
    except ReplicaLost:
        logger.exception("Request failed.")
    assert "Traceback" in caplog.text
    assert caplog.records[0].levelname == "ERROR"
