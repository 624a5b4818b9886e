"""What is known of the weight that a guide bears, as `calibration.json` in its directory holds it.

`actors.training.calibration` finds it out.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

FILE = "calibration.json"


class Point(BaseModel):
    """What a guide does at one weight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float
    """0 is the base alone."""

    num_answers: int
    divergence: float
    """KL(guided || base) in nats a token."""

    ended: float
    """The share of the answers that ended by themselves."""

    distinct_2: float
    """Different pairs of adjacent words over all such pairs in an answer, the mean over answers."""

    distinct_2_error: float
    """Its standard error."""

    longest_repeat: int
    """Words in a row that say again what was just said, the most of all answers."""

    num_tokens: float
    """The mean length of an answer."""

    reward: float | None = None
    """The mean, if a reward was given."""


class Calibration(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    """The base's name."""

    temperature: float
    top_p: float
    max_tokens: int
    reward: str | None
    """module:function, if one was given."""

    weight: float
    """Recommended."""

    is_sound: bool
    """Whether answers at that weight end and vary as the base's do."""

    points: list[Point]


def read_calibration(guide: Path) -> Calibration | None:
    """Return what is known of the guide in that directory; None if it was never calibrated.

    Raises:
        ValueError: the file holds something else.
    """
    path = guide / FILE
    return Calibration.model_validate_json(path.read_text()) if path.is_file() else None
