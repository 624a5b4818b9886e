"""What the fields of requests have in common: how they may be written, and how they are refused."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def without_nulls(fields: Any) -> Any:
    """Return an object without its fields that are null: to send null is to leave a field out."""
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class Fields(BaseModel):
    """An object of a request: every field must be known, and null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: Any) -> Any:
        return without_nulls(fields)


def as_integer(value: Any) -> Any:
    """Return a number like 16.0 as an integer, and all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(as_integer)]
"""JSON has one kind of number, and some clients write whole ones as 16.0."""


def impossible(message: str, field: str) -> PydanticCustomError:
    """Return what a validator raises where fields do not go together, one of which is to be named."""
    return PydanticCustomError("impossible", "{message}", {"message": message, "field": field})
