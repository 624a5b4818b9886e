"""Every error that a caller may want to tell apart.

TrimtabError
├── InvalidConfiguration     a key of deploy.yaml, a model directory or a vocabulary cannot be used; nothing was started
├── InvalidRequest           the caller's request cannot be served as it is; names the field (HTTP 400)
│   ├── UnknownModel         the request names a profile that does not exist (HTTP 404)
│   └── ContextExceeded      prompt and answer together are longer than a model's context
├── Overloaded               no room for another sequence at present; try again later (HTTP 429)
├── ReplicaLost              a model replica died, hung or cannot be had (HTTP 503)
│   └── AnswerLost           what wrote an answer, or the way from there, was lost; it can be asked for again
├── DeadlineExceeded         the request's own time is over (HTTP 504)
├── Preempted                a replica gave a sequence's tokens up for room; the coordinator sends them again
└── EngineError              a sequence cannot take the step it was asked to take; always a defect of the caller

All of them survive pickling, so that Ray can carry them between processes.
"""


class TrimtabError(Exception):
    """Base of every error raised on purpose."""


class InvalidConfiguration(TrimtabError):
    """A setting cannot work; the message gives its path, its value and the remedy."""


class InvalidRequest(TrimtabError):
    """A request cannot be served as it is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class UnknownModel(InvalidRequest):
    """A request names a profile that does not exist."""


class ContextExceeded(InvalidRequest):
    """Prompt and answer together are longer than a model's context."""


class Overloaded(TrimtabError):
    """There is no room for another sequence at present."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s
        """When there may be room, if that is known."""

    def __str__(self) -> str:
        return self.message


class ReplicaLost(TrimtabError):
    """A model replica died, hung, or cannot be had."""


class AnswerLost(ReplicaLost):
    """The writer of an answer died, or the way from it broke: another one can go on with it."""


class DeadlineExceeded(TrimtabError):
    """A request or a step took longer than it was given."""


class Preempted(TrimtabError):
    """A replica gave the tokens of a sequence up, because it needed their room."""


class EngineError(TrimtabError):
    """A sequence cannot take the step that it was asked to take."""


def in_brief(error: BaseException) -> str:
    """Return what an error says, for a client: of one that Ray carried, its cause's words in one line.

    Around them Ray puts a traceback, process ids and addresses, which are for logs.
    """
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip()
    if isinstance(cause, TrimtabError) or "\n" not in text:
        return text or type(cause).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
