"""Preference pairs from a tiny model in this process: what is written, what is kept, and what is refused."""

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.api import Piece
from actors.prompts import Prompt, PromptEncoder
from actors.settings import CHECKOUT
from actors.training.sampling import draw_answers
from cluster.errors import InvalidRequest, Overloaded, TrimtabError
from deploy.cli.options.prefer import COMMAND
from deploy.cli.prefer import main
from deploy.jobs.prefer.answers import Answer, Asked
from deploy.jobs.prefer.sampling import sample_through_service
from deploy.jobs.progress import Progress
from tests import tiny

PROMPTS: list[dict[str, Any]] = [
    {"id": "long", "prompt": "the quick brown fox jumps over the lazy dog"},
    {"id": 7, "messages": [{"role": "user", "content": "naïve?"}]},
    {"prompt": "a"},
    {"id": "last", "prompt": "the quick"},
]
IDS = ["long", 7, 3, "last"]
NUM_SAMPLES, MAX_TOKENS, SEED, BATCH = 5, 6, 9, 2
REWARD = "def letters(prompt, response): return sum(map(str.isalnum, response))\n"

Prefer = Callable[..., int]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with prompts and a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "reward_of_test", raising=False)
    (tmp_path / "reward_of_test.py").write_text(REWARD)
    write(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


@pytest.fixture
def prefer(model: str, folder: Path) -> Prefer:
    """`trimtab prefer` with a model of its own; returns the exit status."""

    def run(**changes: Any) -> int:
        options = {
            "prompts": "prompts.jsonl",
            "output": "pairs.jsonl",
            "reward": "reward_of_test:letters",
            "model": model,
            "samples": NUM_SAMPLES,
            "max_tokens": MAX_TOKENS,
            "seed": SEED,
            "batch": BATCH,
            **changes,
        }
        given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None}
        return main([str(part) for option in given.items() for part in option])

    return run


def write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_models_own_distribution(prefer: Prefer, folder: Path) -> None:
    """Batches of the prompts sorted by length, each with the seed plus the rank of its first."""
    assert prefer() == 0
    tokenizer = tiny.tokenizer()
    encoder = PromptEncoder(tokenizer)
    prompts = [encoder.encode(Prompt(row.get("prompt"), row.get("messages"))) for row in PROMPTS]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    wanted: dict[Any, list[list[int]]] = {}
    for start in range(0, len(prompts), BATCH):
        members = by_length[start : start + BATCH]
        drawn = draw_answers(
            [tiny.llama()],
            [prompts[i] for i in members],
            [(number, ()) for number in range(len(members)) for _ in range(NUM_SAMPLES)],
            max_tokens=MAX_TOKENS,
            end_tokens={tokenizer.eos_token_id},
            generator=torch.Generator().manual_seed(SEED + start),
        )
        tokens = [answer.tokens for answer in drawn]
        wanted |= {IDS[i]: tokens[NUM_SAMPLES * k : NUM_SAMPLES * (k + 1)] for k, i in enumerate(members)}
    records = read(folder / "pairs.answers.jsonl")
    assert {record["id"]: [answer["token_ids"] for answer in record["answers"]] for record in records} == wanted
    for record in records:
        given = PROMPTS[IDS.index(record["id"])]
        assert {name: record.get(name) for name in ("prompt", "messages")} == {
            name: given.get(name) for name in ("prompt", "messages")
        }
        for answer in record["answers"]:
            has_ended = answer["token_ids"][-1] == tokenizer.eos_token_id
            assert answer["finish_reason"] == ("stop" if has_ended else "length")
            assert answer["text"] == tokenizer.decode(answer["token_ids"], skip_special_tokens=True)


def test_every_end_token_of_the_model_ends_an_answer(prefer: Prefer, folder: Path) -> None:
    model = tiny.llama()
    ends = list(range(0, 97, 8))
    model.generation_config.eos_token_id = ends
    assert prefer(model=tiny.save(model, folder / "many_ends")) == 0
    answers = [answer for record in read(folder / "pairs.answers.jsonl") for answer in record["answers"]]
    assert {answer["finish_reason"] for answer in answers} == {"stop", "length"}
    for answer in answers:
        *before, last = answer["token_ids"]
        assert not set(before) & set(ends)
        assert (answer["finish_reason"] == "stop") == (last in ends)
        assert len(answer["text"]) <= len(before) + (last not in ends)


def test_a_model_with_weights_that_it_would_not_use_is_refused(
    prefer: Prefer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(tiny.save(tiny.llama(), folder / "scoring"))
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "score.weight": torch.ones(1, 32)}, path / "model.safetensors", {"format": "pt"})
    assert prefer(model=path) == 2
    assert "holds 1 weights that LlamaForCausalLM does not have, score.weight first" in capsys.readouterr().err


def test_pairs_hold_the_prompt_two_answers_and_their_rewards(
    prefer: Prefer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefer(margin=2, pairs_per_prompt=0) == 0
    answers = {record["id"]: record["answers"] for record in read(folder / "pairs.answers.jsonl")}
    pairs = read(folder / "pairs.jsonl")
    for pair in pairs:
        given = PROMPTS[IDS.index(pair["id"])]
        assert {"id": pair["id"], **given}.items() <= pair.items()
        for side in ("chosen", "rejected"):
            finish_reasons = {a["finish_reason"] for a in answers[pair["id"]] if a["text"] == pair[side]}
            assert pair[f"{side}_finish_reason"] in finish_reasons
            assert pair[f"{side}_reward"] == sum(map(str.isalnum, pair[side]))
        assert pair["chosen_reward"] - pair["rejected_reward"] >= 2
    texts = [
        (one["text"], two["text"])
        for drawn in answers.values()
        for i, one in enumerate(drawn)
        for two in drawn[i + 1 :]
    ]
    wanted = [
        texts
        for texts in texts
        if all(text.strip() for text in texts) and abs(letters(texts[0]) - letters(texts[1])) >= 2
    ]
    assert len(pairs) == len(wanted) > 0
    told = capsys.readouterr().out
    rewards = [letters(answer["text"]) for drawn in answers.values() for answer in drawn]
    assert f"20 answers to 4 prompts, mean reward {sum(rewards) / 20:.4f}" in told
    assert f"{len(pairs)} pairs, {len(set(answers) - {pair['id'] for pair in pairs})} prompts without one" in told


def letters(text: str) -> int:
    return sum(map(str.isalnum, text))


def test_another_reward_is_applied_to_the_same_answers(prefer: Prefer, folder: Path) -> None:
    assert prefer() == 0
    kept = (folder / "pairs.answers.jsonl").read_bytes()
    first = read(folder / "pairs.jsonl")
    (folder / "other_reward_of_test.py").write_text("def fewest(prompt, response): return -len(response)")
    assert prefer(reward="other_reward_of_test:fewest", output="other.jsonl", answers="pairs.answers.jsonl") == 0
    assert (folder / "pairs.answers.jsonl").read_bytes() == kept
    assert read(folder / "other.jsonl") != first
    assert all(len(pair["chosen"]) < len(pair["rejected"]) for pair in read(folder / "other.jsonl"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.95])
def test_a_run_that_was_killed_goes_on(prefer: Prefer, folder: Path, share: float) -> None:
    assert prefer() == 0
    answers, pairs = folder / "pairs.answers.jsonl", folder / "pairs.jsonl"
    whole, wanted = answers.read_bytes(), pairs.read_bytes()
    cut = whole[: int(share * len(whole))]
    answers.write_bytes(cut)
    pairs.unlink()
    assert prefer() == 0
    assert answers.read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])
    assert sorted(answers.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert pairs.read_bytes() == wanted
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "prompts.jsonl",
        "pairs.jsonl",
        "pairs.answers.jsonl",
        "reward_of_test.py",
    }


def test_answers_of_another_program_are_taken(prefer: Prefer, folder: Path) -> None:
    assert prefer() == 0
    wanted = (folder / "pairs.jsonl").read_bytes()
    records = [{k: v for k, v in row.items() if k != "sampling"} for row in read(folder / "pairs.answers.jsonl")]
    # As json.dumps writes it, and without a newline at the end.
    (folder / "theirs.jsonl").write_text("\n".join(map(json.dumps, reversed(records))))
    assert prefer(answers="theirs.jsonl", model=None, batch=None) == 0
    assert (folder / "pairs.jsonl").read_bytes() == wanted
    assert read(folder / "theirs.jsonl") == records[::-1]
    write(folder / "prompts.jsonl", [*PROMPTS, {"prompt": "one more"}])
    assert prefer(answers="theirs.jsonl") == 0
    assert [row["id"] for row in read(folder / "theirs.jsonl")] == [record["id"] for record in records[::-1]] + [5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 4}, "it has 5 answers, which is not --samples 4"),
        ({"max_tokens": 5}, "tokens (length) does not fit --max-tokens 5"),
        ({"max_tokens": 7}, "tokens (length) does not fit --max-tokens 7"),
        ({"temperature": 0.5}, "it was sampled with temperature 1.0, not 0.5"),
        ({"seed": 1}, "it was sampled with seed 9, not 1"),
        ({"model": None, "batch": None}, "it was sampled with model"),
    ],
)
def test_answers_that_do_not_fit_the_options_are_refused(
    prefer: Prefer, folder: Path, changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefer() == 0
    before = (folder / "pairs.answers.jsonl").read_bytes()
    assert prefer(**changes) == 2
    error = capsys.readouterr().err
    assert "pairs.answers.jsonl, line " in error
    assert told in error
    assert "or another --answers" in error
    assert (folder / "pairs.answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (PROMPTS[1:], "no prompt has the id"),
        ([*PROMPTS[:3], {"id": "last", "prompt": "another"}], "'last' is another one than on line 4 of the prompts"),
    ],
)
def test_answers_to_other_prompts_are_refused(
    prefer: Prefer, folder: Path, prompts: list[Row], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefer() == 0
    write(folder / "prompts.jsonl", prompts)
    assert prefer() == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("content", ["a letter to mother", "[]\n", '{"id": 7, "prompt": "a"}\n', '{"line": 1, "te'])
def test_a_file_that_holds_no_answers_is_not_touched(
    prefer: Prefer, folder: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "letter").write_text(content)
    assert prefer(answers="letter") == 2
    assert "letter, line 1: " in capsys.readouterr().err
    assert (folder / "letter").read_text() == content


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not JSON", "line 2: Invalid JSON"),
        ('{"id": "x"}', "line 2: give either prompt or messages"),
        ('{"prompt": "x", "messages": []}', "line 2: give either prompt or messages"),
        ('{"prompt": "x", "seed": 3}', "line 2: seed is not supported; leave it out"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages.0.content is missing"),
        ('{"prompt": "x", "id": "long"}', "line 2: the id 'long' is that of line 1; give another"),
        ('{"prompt": "", "id": "y"}', "line 2: prompt is empty"),
        (json.dumps({"prompt": "x" * 125}), "line 2 has 125 tokens, and --max-tokens leaves room for 122"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(
    prefer: Prefer, folder: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "prompts.jsonl").write_text(f"{json.dumps(PROMPTS[0])}\n{line}\n")
    assert prefer() == 2
    assert told in capsys.readouterr().err
    assert not (folder / "pairs.answers.jsonl").exists()


def test_no_pair_is_an_error_with_the_remedy(prefer: Prefer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prefer(margin=1000) == 1
    told = capsys.readouterr()
    assert "lower --margin, raise --max-length-difference" in told.err
    assert "100.0% were dropped by the margin" in told.out
    assert not (folder / "pairs.jsonl").exists()
    assert prefer(margin=1) == 0


def test_a_reward_that_fails_names_the_prompts_line_and_keeps_the_answers(
    prefer: Prefer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "picky_reward_of_test.py").write_text(
        "def f(prompt, response): return float('nan') if prompt == 'a' else 0"
    )
    assert prefer(reward="picky_reward_of_test:f") == 2
    assert "the reward of answer 1 to prompt 3 is nan" in capsys.readouterr().err
    assert len(read(folder / "pairs.answers.jsonl")) == 4


def test_one_run_at_a_time_writes_the_answers(prefer: Prefer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = "import fcntl, sys; file = open('pairs.answers.jsonl', 'ab'); fcntl.flock(file, fcntl.LOCK_EX)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert prefer() == 2
        assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--samples", "1"], "--samples: at least 2, not 1"),
        (["--max-tokens", "0"], "--max-tokens: 0 tokens are no answer"),
        (["--temperature", "0"], "--temperature: at least 0.01, not 0.0"),
        (["--temperature", "nan"], "--temperature"),
        (["--margin", "-1"], "--margin: at least 0"),
        (["--margin", "nan"], "--margin: at least 0"),
        (["--max-length-difference", "-1"], "--max-length-difference: at least 0"),
        (["--pairs-per-prompt", "-1"], "--pairs-per-prompt: at least 0"),
        (["--concurrency", "0"], "--concurrency: at least 1"),
        (["--weights", '{"kind": NaN}'], "--weights.kind"),
        (["--weights", "kind"], "not JSON"),
        (["--weights", "{}", "--profile", "kind"], "not allowed with"),
        (["--dtype", "bfloat16"], "--dtype: means nothing without --model; leave it out"),
        (["--model", "m", "--concurrency", "3"], "--concurrency: means nothing with --model; leave it out"),
        (["--model", "m", "--batch", "0"], "--batch: at least 1"),
    ],
)
def test_impossible_options_are_refused(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        COMMAND.parse(["--prompts", "a", "--output", "b", "--reward", "c:d", *options])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_files_that_cannot_be_used_stop_the_start(
    prefer: Prefer, folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").write_text("\n\n")
    (folder / "folder").mkdir()
    for changes, told in [
        ({"prompts": "no.jsonl"}, f"--prompts: there is no file {folder / 'no.jsonl'}"),
        ({"prompts": "empty"}, "holds no prompt"),
        ({"output": "no/pairs.jsonl"}, f"there is no folder {folder / 'no'}; make it first"),
        ({"output": "folder"}, f"{folder / 'folder'} is no file"),
        ({"output": "prompts.jsonl"}, "is another file of this run"),
        ({"answers": "pairs.jsonl"}, "is another file of this run"),
        ({"model": "no"}, f"--model: there is no folder {folder / 'no'}"),
        ({"model": "folder"}, f"--model: '{folder / 'folder'}' cannot be loaded"),
        ({"reward": "reward_of_test:sum"}, "sum does not exist in"),
    ]:
        assert prefer(**changes) == 2
        assert told in capsys.readouterr().err
    assert not (folder / "pairs.answers.jsonl").exists()


def test_help_says_why_lengths_matter() -> None:
    command = [sys.executable, "-m", "deploy", "prefer", "--help"]
    told = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert "which drowns the reward" in " ".join(told.split())


class Service:
    """Samples through a service written for the test."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.recorded: dict[str | int, list[str]] = {}
        self.errors: dict[int, Exception] = {}
        """By the number of the request that meets it."""

    async def generate(self, **fields: Any) -> Piece:
        self.requests.append(fields)
        if error := self.errors.get(len(self.requests)):
            raise error
        for _ in range(fields["seed"] % 5):
            await asyncio.sleep(0)
        return {
            "text": f"{fields['prompt']} {fields['seed']}",
            "token_ids": [1],
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            "seed": fields["seed"],
        }

    def run(self, prompts: Sequence[Asked]) -> None:
        def record(asked: Asked, answers: Sequence[Answer]) -> None:
            self.recorded[asked.id] = [answer.text for answer in answers]

        progress = Progress(total=len(prompts) * 3, num_done=0, file=io.StringIO())
        sampling = sample_through_service(
            self.generate,
            prompts,
            record,
            progress,
            num_samples=3,
            fields={"max_tokens": 4, "model": "kinder"},
            seed=1,
            concurrency=4,
            pauses_s=[0, 0],
        )
        asyncio.run(sampling)


ASKED = [Asked(number, f"id {number}", {"prompt": f"prompt {number}"}) for number in (1, 2, 4)]


def test_each_sample_is_a_request_with_its_own_seed() -> None:
    service, alone = Service(), Service()
    service.run(ASKED)
    assert len(service.requests) == len({fields["seed"] for fields in service.requests}) == 9
    assert all(fields["max_tokens"] == 4 and fields["model"] == "kinder" for fields in service.requests)
    alone.run(ASKED[1:])
    assert alone.recorded == {name: service.recorded[name] for name in ("id 2", "id 4")}
    assert set(service.recorded) == {"id 1", "id 2", "id 4"}


def test_a_service_that_is_busy_is_asked_again() -> None:
    calm, busy = Service(), Service()
    calm.run(ASKED)
    busy.errors = {2: Overloaded("full"), 5: Overloaded("full")}
    busy.run(ASKED)
    assert len(busy.requests) == 11
    assert busy.recorded == calm.recorded


def test_a_request_that_fails_for_good_ends_the_run_and_names_the_line() -> None:
    service = Service()
    service.errors = {7: InvalidRequest("there is no guide 'x'", "weights")}
    with pytest.raises(TrimtabError, match=r"line 4: InvalidRequest: there is no guide 'x'; the same command goes on"):
        service.run(ASKED)
    assert "id 4" not in service.recorded
