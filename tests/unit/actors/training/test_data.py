"""Examples for training, out of the files that people have."""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from actors.training.data import Messages, Response, Text, read_pairs, read_texts
from cluster.errors import InvalidConfiguration

TEXTS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
RANKED = {
    "prompt": "Why?",
    "response_0": "No.",
    "response_1": "Because.",
    "better_response_id": 1,
    "safer_response_id": 0,
}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [{"role": "user", "content": "Why?"}]


def said(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


TALK = [{"role": "user", "content": "Hi\nthere"}, {"role": "assistant", "content": "Hello: Human"}, *ASKED]
TALK_TEXT = "\n\nHuman: Hi\nthere\n\nAssistant: Hello: Human\n\nHuman: Why?\n\nAssistant:"
WHOLE = {"chosen": [*ASKED, *said("Because.")], "rejected": [*ASKED, *said("No.")]}
BINARISED = {**WHOLE, "prompt": "Why?", "messages": [*ASKED, *said("Because.")], "score_chosen": 9.0}
PAIR_ROWS = [
    pytest.param(TEXTS, "Why?", id="texts"),
    pytest.param({**TEXTS, "source": "x", "score": None}, "Why?", id="texts-and-more"),
    pytest.param(WHOLE, ASKED, id="conversations"),
    pytest.param(BINARISED, ASKED, id="conversations-and-prompt"),
    pytest.param({"prompt": ASKED, "chosen": said("Because."), "rejected": said("No.")}, ASKED, id="reply-messages"),
    pytest.param({**TEXTS, "prompt": [SYSTEM, *ASKED]}, [SYSTEM, *ASKED], id="reply-texts"),
    pytest.param({"messages": ASKED, "chosen": "Because.", "rejected": "No."}, ASKED, id="messages-as-prompt"),
    pytest.param({**TEXTS, "chosen": "Why?Because.", "rejected": "Why?No."}, "Why?", id="texts-with-their-prompt"),
    pytest.param(
        {"prompt": " Why?\n", "chosen": "Why?Because.", "rejected": "Why?No."},
        "Why?",
        id="texts-with-their-stripped-prompt",
    ),
    pytest.param(
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        ASKED,
        id="transcripts",
    ),
    pytest.param(
        {"chosen": f"{TALK_TEXT} Because.\n", "rejected": f"{TALK_TEXT.strip()} No.", "prompt": None},
        TALK,
        id="long-transcripts",
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("row", "prompt"), PAIR_ROWS)
def test_every_format_gives_the_same_pair(tmp_path: Path, suffix: str, row: Any, prompt: str | Messages) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        write(path, [row])
    read = read_pairs(str(path))
    (pair,) = read.pairs
    assert pair.prompt == prompt
    assert (pair.chosen, pair.rejected) == (Response(text="Because."), Response(text="No."))
    assert (pair.row, read.num_rows, read.skipped, read.source) == (1, 1, {}, str(path))
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    texts = read_texts(str(path))
    assert texts.texts == [Text(prompt=prompt, response=response, row=1) for response in (pair.chosen, pair.rejected)]
    assert (texts.num_rows, texts.digest) == (1, read.digest)


@pytest.mark.parametrize(("objective", "chosen"), [("helpful", "Because."), ("harmless", "No.")])
def test_an_objective_ranks_the_responses(path: Path, objective: Any, chosen: str) -> None:
    (pair,) = read_pairs(write(path, [RANKED]), objective=objective).pairs
    assert pair.chosen.text == chosen
    assert {pair.chosen.text, pair.rejected.text} == {"Because.", "No."}


def test_ranked_responses_may_repeat_the_prompt(path: Path) -> None:
    row = {**RANKED, "response_0": "Why? No.", "response_1": "Why? Because."}
    (pair,) = read_pairs(write(path, [row]), objective="helpful").pairs
    assert (pair.prompt, pair.chosen.text, pair.rejected.text) == ("Why?", " Because.", " No.")


@pytest.mark.parametrize("sides", [("Why? Because.", "No."), ("No.", "Why? Because."), ("Because. Why?", "No. Why?")])
def test_a_response_that_alone_begins_with_the_prompt_keeps_it(path: Path, sides: tuple[str, str]) -> None:
    (pair,) = read_pairs(write(path, [{**TEXTS, "chosen": sides[0], "rejected": sides[1]}])).pairs
    assert (pair.prompt, pair.chosen.text, pair.rejected.text) == ("Why?", *sides)


def test_what_was_cut_stays_cut_without_its_prompt(path: Path) -> None:
    row = {**TEXTS, "chosen": "Why? Be", "rejected": "Why? No.", "chosen_finish_reason": "length"}
    (pair,) = read_pairs(write(path, [row])).pairs
    assert (pair.chosen, pair.rejected) == (Response(text=" Be", is_cut=True), Response(text=" No."))


def test_texts_of_ranked_responses_need_no_objective(path: Path) -> None:
    assert [text.response.text for text in read_texts(write(path, [RANKED])).texts] == ["No.", "Because."]


@pytest.mark.parametrize(
    ("row", "objective", "told"),
    [
        (RANKED, None, "--objective helpful|harmless"),
        (TEXTS, "helpful", "leave it out"),
        (RANKED, "funny", "'funny' is neither of helpful, harmless"),
    ],
)
def test_an_objective_must_fit_the_rows(path: Path, row: Any, objective: Any, told: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        read_pairs(write(path, [row]), objective=objective, skip_bad_rows=True)
    assert told in str(caught.value)


def test_the_finish_reason_says_what_was_cut(path: Path) -> None:
    cut = {**TEXTS, "chosen_finish_reason": "stop", "rejected_finish_reason": "length", "finish_reason": "length"}
    (pair,) = read_pairs(write(path, [cut])).pairs
    assert (pair.chosen.is_cut, pair.rejected.is_cut) == (False, True)
    assert [text.response.is_cut for text in read_texts(str(path)).texts] == [False, True]


ANSWERS = [{"text": "Because.", "finish_reason": "stop", "reward": 0.5}, {"text": "Be", "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "Why?", "response": "So."}, "Why?", [("So.", False)]),
        ({"prompt": ASKED, "response": "So", "finish_reason": "length"}, ASKED, [("So", True)]),
        ({"messages": ASKED, "response": "So.", "finish_reason": None}, ASKED, [("So.", False)]),
        ({"messages": [SYSTEM, *ASKED, *said("So.")]}, [SYSTEM, *ASKED], [("So.", False)]),
        ({"prompt": "Why?", "messages": [*ASKED, *said("So.")]}, ASKED, [("So.", False)]),
        ({"prompt": "Why?", "answers": ANSWERS}, "Why?", [("Because.", False), ("Be", True)]),
        ({"messages": ASKED, "answers": ANSWERS}, ASKED, [("Because.", False), ("Be", True)]),
    ],
)
def test_single_texts(path: Path, row: Any, prompt: Any, responses: list[tuple[str, bool]]) -> None:
    read = read_texts(write(path, [row])).texts
    assert [text.prompt for text in read] == [prompt] * len(responses)
    assert [(text.response.text, text.response.is_cut) for text in read] == responses
    assert {text.row for text in read} == {1}


def test_messages_keep_role_and_content_alone(path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Why?", "name": None}], "response": "So."}
    assert read_texts(write(path, [row])).texts[0].prompt == ASKED


BAD_ROWS = [
    ("{", "not JSON", "Expecting property name"),
    ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "text that is not Unicode", "surrogate"),
    ("[1, 2]", "not a JSON object", "[1, 2]"),
    ({**TEXTS, "chosen": 5}, "chosen of a wrong type", "it is of type int, 5; it must be a text"),
    ({**TEXTS, "chosen": None}, "no chosen", "it must be a text"),
    ({"prompt": "Why?", "rejected": "No."}, "no chosen", "it must be a text"),
    ({**TEXTS, "prompt": ASKED}, "prompt of a wrong type", "it is a list, [{'role': 'user'"),
    ({**TEXTS, "chosen": " \n"}, "empty response", "chosen is ' \\n'"),
    ({**TEXTS, "prompt": ""}, "empty prompt", "prompt is ''"),
    ({**TEXTS, "chosen": "No."}, "both responses the same", "'No.'"),
    ({**TEXTS, "chosen_finish_reason": "tired"}, "unknown finish reason", "chosen_finish_reason is 'tired'"),
    ({"prompt": "Why?", "chosen": "Why?", "rejected": "Why? No."}, "empty response", "the prompt alone, 'Why?'"),
    ({**TEXTS, "prompt": "x" * 500, "chosen": [7] * 500}, "chosen of a wrong type", "[7, 7, 7"),
]
BAD_CONVERSATIONS = [
    ([*ASKED, *ASKED], "no assistant message at the end", "chosen is"),
    ([], "no assistant message at the end", "chosen is []"),
    ([{"role": "user", "content": "Who?"}, *said("I.")], "prompts that differ", "Who?"),
    ([{"role": "poet", "content": "Why?"}, *said("I.")], "unknown role", "chosen[0] has role 'poet'"),
    ([{"role": "user"}, *said("I.")], "messages without a text", "chosen[0] is {'role': 'user'}"),
    (["Why?", "I."], "messages without a text", "chosen[0] is 'Why?'"),
    ([*ASKED, *said("")], "empty response", "chosen is ''"),
]
TRANSCRIPTS = {
    "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
    "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
}
BAD_TRANSCRIPTS = [
    ("Why? Because.", "no prompt", "'Human:' or 'Assistant:'"),
    ("Be brief.\n\nHuman: Why?\n\nAssistant: Because.", "no prompt", "'Be brief."),
    ("\n\nHuman: Why?", "no assistant message at the end", "chosen is"),
    ("\n\nHuman: Why?\n\nAssistant:", "empty response", "chosen is ''"),
    ("\n\nHuman: Who?\n\nAssistant: I.", "prompts that differ", "Who?"),
    ("\n\nHuman:\n\nAssistant: I.", "prompts that differ", "''"),
    ("", "no prompt", "chosen is ''"),
]
BAD_RANKED = [
    ({**RANKED, "better_response_id": 2}, "unknown better_response_id", "better_response_id is 2, not 0 or 1"),
    ({**RANKED, "better_response_id": True}, "unknown better_response_id", "is True"),
    ({**RANKED, "better_response_id": None}, "unknown better_response_id", "is None"),
]
BAD_REPLIES = [
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt", "[]"),
    ({"prompt": [*ASKED, *said("So.")], "chosen": "a", "rejected": "b"}, "prompt that ends with an", "So."),
    ({"messages": said("So."), "chosen": "a", "rejected": "b"}, "no prompt", "only where the last is the user's"),
    ({"prompt": ASKED, "chosen": WHOLE["chosen"], "rejected": "b"}, "more than a reply", "chosen has 2 messages"),
]


@pytest.mark.parametrize(
    ("good", "bad", "reason", "told"),
    [
        *((TEXTS, *case) for case in BAD_ROWS),
        *((WHOLE, {**WHOLE, "chosen": chosen}, reason, told) for chosen, reason, told in BAD_CONVERSATIONS),
        *((TRANSCRIPTS, {**TRANSCRIPTS, "chosen": chosen}, *told) for chosen, *told in BAD_TRANSCRIPTS),
        *((RANKED, *case) for case in BAD_RANKED),
        *(({**TEXTS, "prompt": ASKED}, *case) for case in BAD_REPLIES),
    ],
)
def test_a_bad_row_says_where_and_why_or_is_counted(path: Path, good: Any, bad: Any, reason: str, told: str) -> None:
    source = write(path, [good, "", bad, good])
    objective: Any = "helpful" if good is RANKED else None
    with pytest.raises(InvalidConfiguration) as caught:
        read_pairs(source, objective=objective)
    message = str(caught.value)
    assert message.startswith(f"{source}, line 3: {reason}")
    assert told in message
    assert "--skip-bad-rows" in message
    assert len(message) < len(source) + 300
    read = read_pairs(source, objective=objective, skip_bad_rows=True)
    assert [pair.row for pair in read.pairs] == [1, 4]
    assert read.num_rows == 3
    ((counted, times),) = read.skipped.items()
    assert counted.startswith(reason)
    assert times == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "Why?", "answers": []}, "empty response"),
        ({"prompt": "Why?", "answers": [{"finish_reason": "stop"}]}, "answers without a text"),
        ({"prompt": "Why?", "answers": [{"text": "", "finish_reason": "stop"}]}, "empty response"),
        ({"prompt": "Why?", "answers": "So."}, "answers of a wrong type"),
        ({"prompt": "Why?", "response": "So.", "finish_reason": "tool"}, "unknown finish reason"),
        ({"messages": ASKED}, "no assistant message at the end"),
        ({"messages": [*ASKED, *said("So.")], "response": "So."}, "no prompt"),
    ],
)
def test_a_bad_row_of_single_texts(path: Path, bad: Any, reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=rf"line 1: {reason}"):
        read_texts(write(path, [bad]))


def test_the_first_row_that_can_be_used_decides_the_format(path: Path) -> None:
    read = read_pairs(
        write(path, ["nonsense", {**TEXTS, "prompt": ASKED, "chosen": ""}, TEXTS, WHOLE]), skip_bad_rows=True
    )
    assert [pair.prompt for pair in read.pairs] == ["Why?"]
    assert read.skipped == {"not JSON": 1, "empty response": 1, "no prompt": 1}


@pytest.mark.parametrize("read", [read_pairs, read_texts])
def test_columns_of_no_format_are_listed(path: Path, read: Any) -> None:
    source = write(path, [{"question": "Why?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InvalidConfiguration) as caught:
        read(source)
    assert "question (a text), chosen (a text), rejected (a text)" in str(caught.value)
    assert "better_response_id" in str(caught.value)
    with pytest.raises(
        InvalidConfiguration, match=r"none of 1 rows can be used \(1 columns of no format\).*question \(a text\)"
    ):
        read(source, skip_bad_rows=True)


def test_a_source_of_which_nothing_is_usable_says_so(path: Path) -> None:
    source = write(path, ["{", "{", {**TEXTS, "chosen": ""}])
    with pytest.raises(InvalidConfiguration, match=r"none of 3 rows .*2 not JSON, 1 empty response.*line 1: not JSON"):
        read_pairs(source, skip_bad_rows=True)
    with pytest.raises(InvalidConfiguration, match="holds no row"):
        read_pairs(write(path, ["", " "]))


def test_json_may_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.JSON"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps([TEXTS, 3, TEXTS], indent=1).encode())
    with pytest.raises(InvalidConfiguration, match="row 2: not a JSON object: it is 3"):
        read_pairs(str(path))
    read = read_pairs(str(path), skip_bad_rows=True)
    assert [pair.row for pair in read.pairs] == [1, 3]
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text("[1,")
    with pytest.raises(InvalidConfiguration, match="not JSON"):
        read_pairs(str(path), skip_bad_rows=True)


def test_a_byte_order_mark_and_odd_line_ends_are_read(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(TEXTS).encode() + b"\r\n\xff\n")
    read = read_pairs(str(path), skip_bad_rows=True)
    assert ([pair.row for pair in read.pairs], read.num_rows, read.skipped) == ([2], 2, {"not JSON": 1})


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows: list[dict[str, Any]] = [dict(TEXTS) for _ in range(3000)]
    rows[2100]["chosen"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    with pytest.raises(InvalidConfiguration, match="row 2101: no chosen"):
        read_pairs(str(path))
    read = read_pairs(str(path), skip_bad_rows=True)
    assert (len(read.pairs), read.num_rows, read.pairs[-1].row) == (2999, 3000, 3000)


@pytest.mark.parametrize("source", ["rows.jsonl", "./rows", "/nowhere/rows.txt", "~/no/such/rows", "../rows"])
def test_a_path_that_is_not_there_is_named_in_full(source: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InvalidConfiguration, match=r"^/.*rows.* does not exist"):
        read_pairs(source)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"'\.csv' are not known.*\.jsonl, \.json, \.parquet"):
        read_pairs(write(tmp_path / "rows.csv", [TEXTS]))
    with pytest.raises(InvalidConfiguration, match="is a directory"):
        read_pairs(str(tmp_path))
    with pytest.raises(InvalidConfiguration, match="cannot be read as Parquet"):
        read_pairs(write(tmp_path / "rows.parquet", [TEXTS]))
    with pytest.raises(InvalidConfiguration, match="--split: 'test' is for data sets of the hub"):
        read_pairs(write(tmp_path / "rows.jsonl", [TEXTS]), split="test")


class Hub(SimpleNamespace):
    """In the place of the `datasets` package: one data set, or an error."""

    def load_dataset(self, name: str, *, split: str) -> Any:
        assert (name, split) == ("maker/pairs", "test")
        if isinstance(self.holds, Exception):
            raise self.holds
        return self.holds


def test_a_data_set_of_the_hub_is_read(monkeypatch: Any) -> None:
    digests = []
    for rows in ([TEXTS, {**TEXTS, "chosen": None}], [dict(reversed(TEXTS.items())), {**TEXTS, "chosen": None}]):
        monkeypatch.setitem(sys.modules, "datasets", Hub(holds=rows))
        read = read_pairs("maker/pairs", split="test", skip_bad_rows=True)
        assert ([pair.row for pair in read.pairs], read.skipped) == ([1], {"no chosen": 1})
        digests.append(read.digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("Couldn't reach it"), r"hub cannot be reached \(Couldn't reach it\); give a file of \.jsonl"),
        (ValueError("Unknown split"), "split 'test'.*Unknown split"),
    ],
)
def test_a_hub_that_gives_nothing_is_told(error: Exception, told: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(holds=error))
    with pytest.raises(InvalidConfiguration, match=told):
        read_texts("maker/pairs", split="test")


@pytest.mark.parametrize(("module", "source"), [("datasets", "maker/pairs"), ("pyarrow.parquet", "rows.parquet")])
def test_a_missing_package_says_how_to_get_it(module: str, source: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidConfiguration, match=r"pip install 'trimtab\[train\]'"):
        read_pairs(source)
