"""The form that an answer must have, as OpenAI's and vLLM's fields ask for it, and what of it can be kept.

What the grammar's compiler would pass over in silence is refused here by name.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from actors.api import Format
from actors.coordinator.fields import Fields
from cluster.errors import InvalidRequest

MAX_BYTES = 64 * 2**10
"""Of a schema, a pattern or a grammar."""

MAX_CHOICES = 1024
MAX_DEPTH = 32
MAX_COUNT = 4096
"""Of what a schema or a pattern counts: characters, items, repetitions."""

KEYWORDS = frozenset(
    {
        *("type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions"),
        *("properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"),
    }
)
"""Of JSON schema: those that are kept, and those that say nothing of the text."""

COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
NAMED_SCHEMAS = ("properties", "$defs", "definitions")
LISTED_SCHEMAS = ("anyOf", "oneOf", "prefixItems")
ANY_OBJECT = json.dumps({"type": "object", "additionalProperties": True})


def _parsed(schema: Any) -> Any:
    """A schema that may come as its text."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the text is no JSON: {error}") from error


Schema = Annotated[dict[str, Any], WithJsonSchema({"type": "object"})]


class NamedSchema(Fields):
    """A JSON schema as OpenAI's field brings it."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    json_schema: Schema | None = Field(default=None, alias="schema")
    strict: bool = True
    """Without effect: an answer always keeps to its schema."""


class ResponseFormat(Fields):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and with no other")
        return self

    def format(self) -> Format | None:
        """Return the form that is asked for, if any is."""
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.json_schema
        return Format("json", ANY_OBJECT) if schema is None else _schema_format(schema, "response_format")


class StructuredOutputs(Fields):
    """vLLM's `structured_outputs`: one of these."""

    json_: Annotated[Schema, BeforeValidator(_parsed)] | None = Field(default=None, alias="json")
    """A JSON schema, or its text."""

    json_object: bool = False
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)] | None = (
        None
    )
    grammar: Annotated[str, Field(min_length=1)] | None = None
    """In GBNF, with a rule `root`."""

    @model_validator(mode="after")
    def _check_number(self) -> "StructuredOutputs":
        if sum(map(bool, (self.json_ is not None, self.json_object, self.regex, self.choice, self.grammar))) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self

    def format(self) -> Format:
        """Return the form that is asked for."""
        if self.json_ is not None:
            return _schema_format(self.json_, "structured_outputs")
        if self.regex is not None:
            _check_pattern(self.regex, "structured_outputs.regex")
            return _bounded(Format("regex", self.regex), "structured_outputs")
        if self.choice is not None:
            return _bounded(Format("choice", json.dumps(self.choice)), "structured_outputs")
        if self.grammar is not None:
            return _bounded(Format("grammar", self.grammar), "structured_outputs")
        return Format("json", ANY_OBJECT)


def _schema_format(schema: Mapping[str, Any], field: str) -> Format:
    for path, part in _parts(schema, field):
        _check_part(path, part, field)
    return _bounded(Format("json", json.dumps(schema)), field)


def _bounded(form: Format, field: str) -> Format:
    if (num_bytes := len(form.text.encode(errors="replace"))) > MAX_BYTES:
        raise InvalidRequest(f"{field} has {num_bytes:,} bytes; it may have {MAX_BYTES:,}", field)
    return form


def _parts(schema: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """A schema and those within it, each with where it stands."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{path} is nested deeper than {MAX_DEPTH} schemas", path.partition(".")[0])
    yield path, schema
    if not isinstance(schema, dict):
        return
    for name in NAMED_SCHEMAS:
        inner = schema.get(name, {})
        for key, part in inner.items() if isinstance(inner, dict) else ():
            yield from _parts(part, f"{path}.{name}.{key}", depth + 1)
    for name in LISTED_SCHEMAS:
        listed = schema.get(name, [])
        for number, part in enumerate(listed if isinstance(listed, list) else ()):
            yield from _parts(part, f"{path}.{name}.{number}", depth + 1)
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from _parts(schema[name], f"{path}.{name}", depth + 1)


def _check_part(path: str, schema: Any, field: str) -> None:
    """Raise `InvalidRequest` for what would not be kept."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{path} is no JSON schema, which is an object, true or false", field)
    for name in schema:
        if name not in KEYWORDS:
            known = ", ".join(sorted(KEYWORDS))
            raise InvalidRequest(
                f"{path}.{name}: this keyword would not be kept to; leave it out. These are: {known}", field
            )
    for name in COUNTS:
        count = schema.get(name, 0)
        if not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
            raise InvalidRequest(f"{path}.{name}: give a whole number from 0 to {MAX_COUNT}", field)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise InvalidRequest(f"{path}: properties are an object by name, and required is a list of names", field)
    for name in required:
        if name not in list(properties):
            raise InvalidRequest(f"{path}.required: {name!r} is none of the properties; describe it there", field)
    if "pattern" in schema:
        _check_pattern(str(schema["pattern"]), f"{path}.pattern")


def _check_pattern(pattern: str, path: str) -> None:
    """Raise `InvalidRequest` for what a pattern's compiler passes over, or takes too long for."""
    field = path.partition(".")[0]
    if re.search(r"\(\?(?:[=!]|<[=!])|\\[bB]", pattern):
        raise InvalidRequest(f"{path}: what looks ahead or behind, and \\b, are not kept to; leave them out", field)
    if any(int(count[:9]) > MAX_COUNT for count in re.findall(r"(?<=[{,])\d+", pattern)):
        raise InvalidRequest(f"{path}: it may repeat a part {MAX_COUNT} times at most", field)
