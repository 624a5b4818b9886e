"""Training data as people have it: what docs/guides.md says of it is so."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from actors.settings import CHECKOUT
from actors.training.data import read_pairs
from actors.training.encoding import EncodedPair, ResponseEncoder, TokenLimits
from cluster.errors import InvalidConfiguration
from tests import tiny

TEXTS = {"prompt": "why", "chosen": "so", "rejected": "no"}
ASKED = [{"role": "user", "content": "why"}]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    *ASKED,
]
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def said(content: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


def sides(prompt: list[Any], chosen: Any = "so", rejected: Any = "no") -> dict[str, Any]:
    return {"chosen": [*prompt, *said(chosen)], "rejected": [*prompt, *said(rejected)]}


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


IMAGE = {"type": "image_url", "text": None, "image_url": "a.png"}
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: why\n\nAssistant: "
SAFE = {
    "prompt": "why",
    "response_0": "no",
    "response_1": "so",
    "is_response_0_safe": True,
    "better_response_id": 1,
    "safer_response_id": 0,
}
BINARISED = {
    **sides(ASKED),
    "prompt": "why",
    "prompt_id": "0f",
    "messages": sides(ASKED)["chosen"],
    "score_chosen": 8.0,
}
PLAIN = ("why", "so<end>", "no<end>")
CHAT = ("user: why\nassistant: ", "so\n<end>", "no\n<end>")
LONG_TALK = ("system: be brief\nuser: hi\nassistant: ho\nuser: why\nassistant: ", "so\n<end>", "no\n<end>")

USED: dict[str, list[tuple[Any, dict[str, Any], tuple[str, str, str]]]] = {
    "`prompt`, `chosen`, `rejected` as texts": [(TEXTS, {}, PLAIN), ({**TEXTS, "source": None}, {}, PLAIN)],
    "texts that repeat their prompt": [
        ({**TEXTS, "chosen": "whyso", "rejected": "whyno"}, {}, PLAIN),
        ({**TEXTS, "prompt": "why\n", "chosen": "why so", "rejected": "why no"}, {}, ("why", " so<end>", " no<end>")),
    ],
    "hh-rlhf as it is: `chosen`, `rejected` as whole texts with `Human:` and `Assistant:`": [
        (
            {"chosen": f"{TRANSCRIPT}so", "rejected": f"{TRANSCRIPT}no"},
            {},
            ("user: hi\nassistant: ho\nuser: why\nassistant: ", *CHAT[1:]),
        ),
        ({"chosen": "\n\nHuman: why\n\nAssistant: so ", "rejected": "\n\nHuman: why\n\nAssistant: no"}, {}, CHAT),
    ],
    "UltraFeedback, binarised: message lists with a `prompt` beside them": [(BINARISED, {}, CHAT)],
    "PKU-SafeRLHF with `--objective helpful` or `harmless`": [
        (SAFE, {"objective": "helpful"}, PLAIN),
        (SAFE, {"objective": "harmless"}, ("why", "no<end>", "so<end>")),
    ],
    "conversations of several turns with a `system` message": [
        (sides(TALK), {}, LONG_TALK),
        ({"prompt": TALK, "chosen": "so", "rejected": "no"}, {}, LONG_TALK),
        ({"messages": TALK, "chosen": "so", "rejected": "no"}, {}, LONG_TALK),
    ],
    "contents as parts of texts": [
        (sides([{"role": "user", "content": parts("wh", "y")}], parts("s", "o"), parts("no")), {}, CHAT),
        ({"prompt": [{"role": "user", "content": parts("why")}], "chosen": "so", "rejected": "no"}, {}, CHAT),
    ],
    "answers of one message each beside a list as `prompt`": [
        ({"prompt": ASKED, "chosen": said("so"), "rejected": said("no")}, {}, CHAT)
    ],
    "U+2028, U+2029, U+0085 inside texts": [
        ({**TEXTS, "chosen": f"s{mark}o"}, {}, ("why", "s o<end>", "no<end>")) for mark in "\u2028\u2029\u0085"
    ],
    "nested Parquet, absent fields as nulls": [
        (sides([{"role": "user", "content": "why", "name": None}]), {}, CHAT),
        ({"prompt": None, **sides(ASKED)}, {}, CHAT),
    ],
    "answers beyond `--max-response-tokens`": [({**TEXTS, "chosen": "so it was"}, {}, ("why", "so i", "no<end>"))],
    "answers with `finish_reason: length`": [
        ({**TEXTS, "chosen_finish_reason": "length"}, {}, ("why", "so", "no<end>"))
    ],
}
REFUSED: dict[str, list[tuple[Any, str]]] = {
    "hh-rlhf rows that part before their last answer": [
        ({"chosen": f"{TRANSCRIPT}so", "rejected": f"{TRANSCRIPT.replace('ho', 'ha')}no"}, "prompts that differ")
    ],
    "UltraFeedback rows with equal answers": [
        ({**BINARISED, **sides(ASKED, "so", "so")}, "both responses the same"),
        ({**TEXTS, "rejected": "so"}, "both responses the same"),
    ],
    "PKU-SafeRLHF without an objective": [(SAFE, "--objective helpful|harmless")],
    "contents with an image": [
        (
            sides([{"role": "user", "content": [*parts("why"), IMAGE]}], parts("so"), parts("no")),
            "messages with more than text",
        ),
        (sides([{"role": "user", "content": parts("why")}], [IMAGE], parts("no")), "messages with more than text"),
    ],
    "roles that the template refuses": [(sides([*ASKED, *ASKED]), "roles must alternate")],
    "a row longer than the model, or the base": [
        ({**TEXTS, "prompt": "x" * 90, "chosen": "so"}, "more than the 80 positions"),
        (sides([{"role": "user", "content": "y" * 90}]), "more than the 80 positions"),
    ],
    "an answer of white space": [
        ({**TEXTS, "chosen": "\n"}, "empty response"),
        (sides(ASKED, " "), "empty response"),
        ({"chosen": TRANSCRIPT, "rejected": f"{TRANSCRIPT}no"}, "empty response"),
    ],
}


def read(path: Path, rows: list[Any], template: str | None = None, **options: Any) -> list[EncodedPair]:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    fast = tiny.tokenizer()
    fast.chat_template = template or tiny.CHAT_TEMPLATE
    limits = TokenLimits(max_response=4, max_positions=80)
    return ResponseEncoder(fast, limits).pairs(read_pairs(str(path), **options).pairs)


def decoded(tokens: list[int]) -> str:
    return str(tiny.tokenizer().backend_tokenizer.decode(tokens, skip_special_tokens=False))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("row", "options", "pair"), [case for cases in USED.values() for case in cases])
def test_rows_of_a_kind_become_a_pair(
    tmp_path: Path, suffix: str, row: Any, options: dict[str, Any], pair: tuple[str, str, str]
) -> None:
    [encoded] = read(tmp_path / f"rows{suffix}", [row], **options)
    assert tuple(map(decoded, (encoded.prompt, encoded.chosen, encoded.rejected))) == pair


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("row", "told"), [case for cases in REFUSED.values() for case in cases])
def test_rows_of_a_kind_are_refused(tmp_path: Path, suffix: str, row: Any, told: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        read(tmp_path / f"rows{suffix}", [row], ALTERNATING if "alternate" in told else None)
    assert told in str(caught.value)
    assert "1" in str(caught.value) or "objective" in told


def test_the_guide_lists_them_all() -> None:
    section = (CHECKOUT / "docs" / "guides.md").read_text().partition("## What becomes of the data that people have")[2]
    rows = [line.split(" | ") for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert {row[0].removeprefix("| ") for row in rows} == {*USED, *REFUSED}
    for name, becomes in rows:
        assert becomes.startswith("refused") == (name.removeprefix("| ") in REFUSED)
