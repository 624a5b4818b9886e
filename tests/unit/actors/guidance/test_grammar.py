"""Masks allow what the grammar allows: found out token by token, and by whole answers under the oracle."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.api import Format, Sampling, Shaping
from actors.coordinator.spelling import Spelling
from actors.guidance.drawing import merge_and_draw
from actors.guidance.grammar import GrammarMask, Grammars
from actors.guidance.reference import Voice, generate
from actors.guidance.shaping import Shaper
from cluster.errors import InvalidRequest
from tests import tiny

NUM_TOKENS = 97
CHARACTERS = tiny.tokenizer(NUM_TOKENS)
SPELLING = Spelling(CHARACTERS.backend_tokenizer)
GRAMMARS = Grammars(lambda: SPELLING.text_bytes(NUM_TOKENS), {0})


def legal(mask: GrammarMask) -> set[int]:
    row = np.zeros(NUM_TOKENS, np.float32)
    mask.forbid(row)
    return {int(token) for token in np.flatnonzero(row == 0)}


def expected(choices: Sequence[str], text: str) -> set[int]:
    """The tokens that may come after a text that begins one of the choices."""
    following = {choice[len(text)] for choice in choices if choice.startswith(text) and choice != text}
    return {*map(int, CHARACTERS.convert_tokens_to_ids(sorted(following))), *([0] if text in choices else [])}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text('ab{"\\ ', min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_what_may_come_next_is_what_a_choice_goes_on_with(choices: list[str], data: st.DataObject) -> None:
    mask = GRAMMARS.mask(Format("choice", json.dumps(choices)))
    written = data.draw(st.sampled_from(choices))
    for length, token in enumerate(CHARACTERS(written).input_ids):
        assert legal(mask) == expected(choices, written[:length])
        mask.append(token)
    assert legal(mask) == expected(choices, written)


def test_a_choice_may_hold_any_character() -> None:
    mask = GRAMMARS.mask(Format("choice", json.dumps(['a"\n\\U0041', "漢字"])))
    for token in CHARACTERS('a"\n\\U0041').input_ids:
        assert token in legal(mask)
        mask.append(token)
    assert legal(mask) == {0}


CHOICES = ["yes", "yellow", "no", "not now"]


def test_a_masked_answer_is_the_oracles() -> None:
    base, guide = (tiny.talkative(tiny.llama(NUM_TOKENS, seed=seed)) for seed in range(2))
    prompt = [5, 9, 30, 2]

    def is_legal(output: Sequence[int], token: int) -> bool:
        return token in expected(CHOICES, "".join(CHARACTERS.convert_ids_to_tokens(list(output))))

    answers = set()
    for seed in range(12):
        sampling = Sampling(seed=seed, top_p=0.9, temperature=2.0)
        voices = Voice(model=base, prompt=prompt), [Voice(model=guide, prompt=prompt, weight=0.8)]
        text = generate(*voices, sampling=sampling, max_tokens=20, end_tokens={0}, is_legal=is_legal)
        mask = GRAMMARS.mask(Format("choice", json.dumps(CHOICES)))
        shaper = Shaper(Shaping(), prompt=prompt, end_tokens={0}, mask=mask)
        output: list[int] = []
        while 0 not in output:
            rows = [model(torch.tensor([[*prompt, *output]])).logits[0, -1].detach() for model in (base, guide)]
            (token,) = merge_and_draw([rows[0]], [[(0.8, rows[1])]], [sampling], [len(output)], [0], [shaper])  # type: ignore[list-item]
            assert token is not None
            shaper.append(token)
            output.append(token)
        assert output == text.tokens
        answers.add("".join(CHARACTERS.convert_ids_to_tokens(output[:-1])))
    assert answers <= set(CHOICES)
    assert len(answers) > 1


def write(form: Format, seed: int, max_tokens: int = 400) -> str:
    """Random text in a form, that ends as soon as it may."""
    mask, generator = GRAMMARS.mask(form), np.random.default_rng(seed)
    text = ""
    for _ in range(max_tokens):
        tokens = legal(mask)
        if 0 in tokens:
            return text
        token = int(generator.choice(sorted(tokens)))
        mask.append(token)
        text += CHARACTERS.convert_ids_to_tokens(token)
    return text


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}


def test_json_keeps_to_its_schema() -> None:
    form = Format("json", json.dumps(PERSON))
    for seed in range(40):
        jsonschema.validate(json.loads(write(form, seed)), PERSON)


def _range(kind: str, names: tuple[str, str], low: int, span: int) -> dict[str, Any]:
    return {"type": kind, names[0]: low, names[1]: low + span}


LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-50, 50),
        st.integers(0, 99),
    ),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.sampled_from(["a", "b c", 3, None, True]), min_size=1, unique_by=str),
    ),
    st.just({"type": "string", "pattern": "^[a-c]{2}x?$"}),
    st.just({"const": "x"}),
)


def _inner(schemas: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.text("abc", min_size=1, max_size=3), schemas, max_size=4)
    return st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, schemas, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(schemas, min_size=1, max_size=3)),
        st.builds(
            lambda found, number: {
                "type": "object",
                "properties": found,
                "required": sorted(found)[:number],
                "additionalProperties": False,
            },
            properties,
            st.integers(0, 4),
        ),
    )


@settings(max_examples=200, deadline=None)
@given(schema=st.recursive(LEAVES, _inner, max_leaves=8), seed=st.integers(0, 2**32))
def test_json_keeps_to_any_schema(schema: dict[str, Any], seed: int) -> None:
    jsonschema.validate(json.loads(write(Format("json", json.dumps(schema)), seed, max_tokens=3000)), schema)


def test_text_keeps_to_its_pattern() -> None:
    for seed in range(20):
        assert re.fullmatch(r"[a-c]{2,4}(x|yz)\d", write(Format("regex", r"[a-c]{2,4}(x|yz)\d"), seed))


def test_a_grammar_of_ones_own() -> None:
    for seed in range(20):
        form = Format("grammar", 'root ::= "(" root ")" | "x"')
        assert re.fullmatch(r"\(*x\)*", write(form, seed))


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (Format("json", '{"type": "objct"}'), 'json: Unsupported type "objct"'),
        (Format("regex", "(a"), "regex: Regex parsing error at position 3: The parenthesis is not closed"),
        (Format("grammar", "root ::= "), "grammar: EBNF parser error"),
        (Format("grammar", 'a ::= "x"'), "grammar: "),
    ],
)
def test_what_is_no_grammar_is_refused_with_its_reason(form: Format, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.mask(form)
    assert str(caught.value).startswith(says)
