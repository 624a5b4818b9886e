"""docs/api.md lists what can be sent, all of it and nothing else."""

import re

import pytest
from pydantic import BaseModel

from actors.settings import CHECKOUT
from deploy.http.openai_schema import ChatCompletionRequest, CompletionRequest, TextRequest

DOCUMENT = (CHECKOUT / "docs" / "api.md").read_text()


def listed(heading: str) -> set[str]:
    """The fields in the first column of the table below a heading."""
    table = DOCUMENT.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("Both endpoints", TextRequest),
        ("`/v1/chat/completions`", ChatCompletionRequest),
        ("`/v1/completions`", CompletionRequest),
    ],
)
def test_every_field_of_the_schema_is_listed_and_no_other(heading: str, schema: type[BaseModel]) -> None:
    shared = set() if schema is TextRequest else set(TextRequest.model_fields) - set(schema.__annotations__)
    assert listed(heading) == set(schema.model_fields) - shared
