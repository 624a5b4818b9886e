"""Which forms of an answer can be asked for, and what is refused because it would not be kept to."""

import json
from typing import Any

import pytest

from actors.api import Format
from actors.coordinator.request import parse_request
from actors.settings import GuidanceSettings
from cluster.errors import InvalidRequest

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def form(**fields: Any) -> Format | None:
    return parse_request(GuidanceSettings(), {"prompt": "x", **fields}, 60).form


def response_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


def test_plain_text_has_no_form() -> None:
    assert form() is None
    assert form(response_format={"type": "text"}) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": response_format(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
    ],
)
def test_a_schema_may_come_in_several_ways(fields: dict[str, Any]) -> None:
    assert form(**fields) == Format("json", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"regex": "a+"}, Format("regex", "a+")),
        ({"choice": ["a", "b"]}, Format("choice", '["a", "b"]')),
        ({"grammar": 'root ::= "a"'}, Format("grammar", 'root ::= "a"')),
    ],
)
def test_other_forms(asked: dict[str, Any], expected: Format) -> None:
    assert form(structured_outputs=asked) == expected


def test_any_object() -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        {"structured_outputs": {"json_object": True}},
    ):
        asked = form(**fields)
        assert asked is not None
        assert json.loads(asked.text) == {"type": "object", "additionalProperties": True}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "not 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with type json_schema"),
        ({"response_format": response_format(3)}, "response_format.json_schema.schema", "valid dictionary, not 3"),
        ({"structured_outputs": {}}, "structured_outputs", "give one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one of"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "the text is no JSON"),
        ({"structured_outputs": {"json": "[" * 10**5}}, "structured_outputs.json", "the text is no JSON"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "not both",
        ),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens", "does not go with a form"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "does not go with a form"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "70,000 bytes; it may have 65,536"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "looks ahead or behind"),
        ({"structured_outputs": {"regex": "a{5000}"}}, "structured_outputs", "4096 times at most"),
        (
            {"response_format": response_format({"properties": {"a": {"multipleOf": 3}}})},
            "response_format",
            "response_format.properties.a.multipleOf: this keyword would not be kept to",
        ),
        ({"response_format": response_format({"maxItems": 10**9})}, "response_format", "whole number from 0 to 4096"),
        ({"response_format": response_format({"required": ["b"]})}, "response_format", "'b' is none of the properties"),
        ({"response_format": response_format({"items": [3]})}, "response_format", "items is no JSON schema"),
        ({"response_format": response_format({"required": 3})}, "response_format", "required is a list of names"),
        ({"response_format": response_format(nested(40))}, "response_format", "nested deeper than 32"),
    ],
)
def test_what_cannot_be_kept_to_is_named(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        form(**fields)
    assert caught.value.field == field
    assert says in str(caught.value)
