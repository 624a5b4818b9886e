"""`trimtab train` and `trimtab derive` before anything is trained: what they refuse, and what they make of the data."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from actors.training.data import Pair, Response
from actors.training.derive import choose_layers
from actors.training.encoding import EncodedText
from actors.training.run import CHECKPOINTS, SETTINGS, RunSettings, newest_checkpoint
from cluster.errors import InvalidConfiguration
from deploy.cli import derive, train
from deploy.cli.derive import parse_layers
from deploy.cli.options.derive import COMMAND as DERIVE
from deploy.cli.options.train import COMMAND as TRAIN
from deploy.cli.train import split_by_prompt
from deploy.jobs.training import run as training
from deploy.jobs.training.run import Job, choose_dtype, prepare_output, progress
from tests.tiny import gemma3, gpt2, llama, save, tokenizer

ROWS = [{"prompt": f"prompt {i}", "chosen": "yes", "rejected": "no"} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Callable[[list[Any]], str]:
    def write(rows: list[Any]) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("role", ["--model", "--base"])
def test_responses_end_with_every_end_token_that_serving_knows(
    tmp_path: Path, data: Callable[[list[Any]], str], role: str
) -> None:
    model = llama()
    # The character `.`, as Gemma's end of turn is beside the tokenizer's own end token.
    dot = tokenizer().convert_tokens_to_ids(".")
    model.generation_config.eos_token_id = [0, dot]
    path = save(model, tmp_path / "dotted")
    rows = [{**row, "chosen": "yes. no"} for row in ROWS]
    options = TRAIN.parse([role, path, "--data", data(rows), "--output", "nowhere"])
    job, _ = train.prepare(options)
    assert {example.chosen[-1] for example in job.examples} == {dot}  # type: ignore[union-attr]
    assert {example.rejected[-1] for example in job.examples} == {0}  # type: ignore[union-attr]


LONG = "x" * 200


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": LONG, "chosen": "a", "rejected": "b"},
        {"prompt": "a", "chosen": LONG, "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": LONG},
        {"prompt": [{"role": "user", "content": "a" * 60}], "chosen": "b" * 60, "rejected": "c"},
    ],
)
@pytest.mark.parametrize("build", [llama, gpt2, gemma3])
def test_examples_beyond_the_models_positions_are_refused_before_anything_starts(
    tmp_path: Path, data: Callable[[list[Any]], str], build: Any, row: dict[str, Any]
) -> None:
    path = save(build(), tmp_path / "short")
    prompt = row["prompt"] if isinstance(row["prompt"], str) else [{"role": "user", "content": "a"}]
    rows = data([{"prompt": prompt[:1], "chosen": "yes", "rejected": "no"}] * 20 + [row])
    jobs: tuple[Callable[..., Job], ...] = (
        lambda *more: train.prepare(options_of(path, rows, "--validation-share", "0", *more))[0],
        lambda *more: derive.prepare(
            DERIVE.parse(["--model", path, "--keep", "1", "--data", rows, "--output", "x", *more])
        ),
    )
    for prepare in jobs:
        with pytest.raises(InvalidConfiguration, match=r"row 21: \d+ tokens.* 128 positions.*--max-response-tokens"):
            prepare()
        job = prepare("--skip-bad-rows")
        assert max(example.length for example in job.examples) <= 128
        assert "left out: examples of more than 128 tokens, the model's positions" in "\n".join(job.data)
        assert prepare("--max-prompt-tokens", "80", "--max-response-tokens", "20").examples


def test_the_bases_positions_count_too(tmp_path: Path, data: Callable[[list[Any]], str]) -> None:
    guide, base = (
        save(llama(max_position_embeddings=limit), tmp_path / name) for name, limit in (("guide", 512), ("base", 64))
    )
    rows = data([*ROWS, {"prompt": "x" * 80, "chosen": "a", "rejected": "b"}])
    train.prepare(options_of(guide, rows))
    with pytest.raises(InvalidConfiguration, match=r"row 41: 82 tokens.* 64 positions"):
        train.prepare(options_of(guide, rows, "--base", base))


def options_of(model: str, data: str, *more: str) -> Any:
    return TRAIN.parse(["--model", model, "--data", data, "--output", "nowhere", *more])


def test_the_defaults_are_the_papers(model: str, data: Callable[[list[Any]], str]) -> None:
    job, _ = train.prepare(options_of(model, data(ROWS * 20)))
    settings = job.settings
    assert (settings.objective, settings.beta, settings.batch_size, settings.learning_rate) == ("arm", 0.05, 16, 5e-4)
    assert (settings.lora_rank, settings.lora_alpha) == (8, 16)
    assert (settings.margin, settings.length_normalised) == (0.0, False)
    assert settings.num_steps == max(64, round(len(job.examples) / 16))


def test_the_report_says_what_was_kept_and_what_was_not(model: str, data: Callable[[list[Any]], str]) -> None:
    rows = [*ROWS, {"prompt": "x" * 50, "chosen": "a", "rejected": "b"}, {"prompt": "y", "chosen": "a"}]
    options = options_of(model, data(rows), "--max-prompt-tokens", "20", "--skip-bad-rows", "--validation-share", "0")
    job, kept_back = train.prepare(options)
    report = "\n".join(job.data)
    assert "42 rows" in report
    assert "1 rows skipped" in report
    assert "1 left out: prompts of more than 20 tokens" in report
    assert "40 examples" in report
    assert kept_back == []


MIXTURE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
    "pad_token_id": None,
    "bos_token_id": None,
}


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        (LlamaConfig(**MIXTURE), 100),
        (GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=97, tie_word_embeddings=False), 100),
        (GraniteMoeConfig(**MIXTURE, num_local_experts=4, num_experts_per_tok=2), 11),
        (MixtralConfig(**MIXTURE, num_local_experts=4), 11),
        (Qwen3MoeConfig(**MIXTURE, num_experts=2, moe_intermediate_size=16, mlp_only_layers=[0]), 77),
        (OlmoeConfig(**MIXTURE, num_experts=8), 6),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_what_an_adapter_reaches_is_said_and_little_is_warned_of(
    tmp_path: Path, data: Callable[[list[Any]], str], config: Any, reach: int
) -> None:
    path = save(AutoModelForCausalLM.from_config(config), tmp_path / "mixture")
    report = "\n".join(train.prepare(options_of(path, data(ROWS)))[0].data)
    share = re.search(r"the adapter, of rank 8, reaches (\d+)% of the weights of the layers", report)
    assert share
    assert abs(int(share[1]) - reach) <= 6
    assert ("WARNING" in report) == (reach < 50)
    assert ("--full trains all weights" in report) == (reach < 50)
    assert "adapter" not in "\n".join(train.prepare(options_of(path, data(ROWS), "--full"))[0].data)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beta", "0"], "--beta: 0.0 is not above 0"),
        (["--loss", "dpo", "--margin", "1"], "belong to --loss arm"),
        (["--base", "BASE", "--length-normalised"], "belong to --loss arm without --base"),
        (["--base", "BASE", "--loss", "dpo"], "--base is for guides"),
        (["--base", "BASE", "--keep", "2"], "--keep: is for the base's own layers"),
        (["--base", "/nowhere/at/all"], "--base: no model at /nowhere/at/all"),
        (["--eval-every", "0"], "--eval-every: 0 is not above 0"),
        (["--map-rank", "4"], "--map-rank: belongs to --base"),
        (["--base", "BASE", "--full", "--lora-rank", "4"], "--lora-rank: --full trains no adapter"),
        (["--base", "BASE", "--map-rank", "0"], "--map-rank: 0 is less than 1"),
        (["--base", "BASE", "--kl", "-1"], "--kl: -1.0 is not 0 or more"),
        (["--kl", "1"], "--kl: is the distance from a --base"),
        (["--patience", "0"], "--patience: 0 is not above 0"),
        (["--lora-rank", "0"], "--full trains all weights"),
        (["--full", "--lora-alpha", "4"], "--lora-alpha: --full trains no adapter"),
        (["--learning-rate", "-1"], "--learning-rate: -1.0"),
        (["--batch-size", "0"], "--batch-size: 0 is not above 0"),
        (["--epochs", "0"], "--epochs: 0.0 is not above 0"),
        (["--workers", "0"], "--workers: 0 is not above 0"),
        (["--max-response-tokens", "0"], "--max-response-tokens: 0 is less than 1"),
        (["--validation-share", "1"], "--validation-share: 1.0 is not from 0 up to 1"),
        (["--max-prompt-tokens", "2"], "no pair is left to train on"),
    ],
)
def test_options_that_cannot_work_are_refused(
    model: str, data: Callable[[list[Any]], str], more: list[str], message: str
) -> None:
    more = [model if each == "BASE" else each for each in more]
    with pytest.raises(InvalidConfiguration, match=message):
        train.prepare(options_of(model, data(ROWS), *more))


def under_base(base: str, data: str, *more: str) -> RunSettings:
    options = TRAIN.parse(["--base", base, "--data", data, "--output", "nowhere", *more])
    return train.prepare(options)[0].settings


def test_a_guide_under_a_base_is_made_of_its_first_layers(model: str, data: Callable[[list[Any]], str]) -> None:
    settings = under_base(model, data(ROWS))
    assert (settings.objective, settings.model, settings.base) == ("guided", model, model)
    assert (settings.layers, settings.beta) == ((0,), 0.1)
    assert (settings.map_only, settings.map_rank, settings.lora_rank, settings.learning_rate) == (True, 8, 0, 4e-3)
    adapted = under_base(model, data(ROWS), "--lora-rank", "4")
    assert (adapted.map_only, adapted.lora_rank, adapted.learning_rate) == (False, 4, 5e-4)
    assert not under_base(model, data(ROWS), "--full").map_only
    assert under_base(model, data(ROWS), "--keep", "2").layers == (0, 1)
    assert under_base(model, data(ROWS), "--model", model).layers is None
    with pytest.raises(InvalidConfiguration, match="--keep: 4 layers cannot be kept; the base has 3"):
        under_base(model, data(ROWS), "--keep", "4")
    nothing = TRAIN.parse(["--data", data(ROWS), "--output", "nowhere"])
    with pytest.raises(InvalidConfiguration, match="--model: name what to train, or a --base"):
        train.prepare(nothing)


def test_few_pairs_are_trained_on_for_some_steps_all_the_same(model: str, data: Callable[[list[Any]], str]) -> None:
    for more, steps in (([], 64), (["--epochs", "1"], 2), (["--steps", "7"], 7)):
        settings = under_base(model, data(ROWS), *more)
        assert settings.num_steps == steps


@pytest.mark.parametrize(
    ("found", "on_gpu", "dtype"),
    [({}, False, "float32"), ({"avx512_bf16": True}, False, "bfloat16"), ({}, True, "bfloat16")],
)
def test_products_are_in_bfloat16_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], on_gpu: bool, dtype: str
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)
    assert choose_dtype("auto", on_gpu=on_gpu) == dtype
    assert choose_dtype("float32", on_gpu=on_gpu) == "float32"


def test_a_model_that_is_not_there_is_refused_with_its_path(data: Callable[[list[Any]], str]) -> None:
    with pytest.raises(InvalidConfiguration, match=r"--model: no model at /nowhere/at/all"):
        train.prepare(options_of("/nowhere/at/all", data(ROWS)))


def test_data_without_a_usable_pair_is_refused_before_any_model_loads(data: Callable[[list[Any]], str]) -> None:
    """The model named does not exist: the data comes first."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}]
    status = train.main(["--model", "some/hub-id", "--data", data(rows), "--output", "nowhere", "--skip-bad-rows"])
    assert status == 2
    assert not Path("nowhere").exists()


def pairs(prompts: list[str]) -> list[Pair]:
    return [
        Pair(prompt=prompt, chosen=Response(text="a"), rejected=Response(text="b"), row=i)
        for i, prompt in enumerate(prompts)
    ]


def test_prompts_kept_back_are_never_trained_on_and_the_same_in_every_data_set() -> None:
    prompts = [f"prompt {i}" for i in range(500)]
    training, kept_back = split_by_prompt(pairs(prompts * 2), 0.1, seed=3)
    held_out = {pair.prompt for pair in kept_back}
    assert held_out.isdisjoint(pair.prompt for pair in training)
    assert len(training) + len(kept_back) == 1000
    assert 25 <= len(held_out) <= 80
    _, fewer = split_by_prompt(pairs(prompts[100:]), 0.1, seed=3)
    assert {pair.prompt for pair in fewer} == held_out & set(prompts[100:])
    assert {pair.prompt for pair in split_by_prompt(pairs(prompts), 0.1, seed=4)[1]} != held_out


@pytest.mark.parametrize(
    ("text", "layers"), [("0-2,5", (0, 1, 2, 5)), ("3", (3,)), ("0-0,1", (0, 1)), (" 1 , 4-5", (1, 4, 5))]
)
def test_layers_are_named_one_by_one_or_by_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "2,1", "1,1", "0-2,2", "-1"])
def test_lists_of_layers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="--layers"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("kept", "layers"),
    [(1, (0,)), (2, (0, 29)), (4, (0, 1, 2, 29)), (10, (*range(7), 27, 28, 29)), (30, tuple(range(30)))],
)
def test_a_number_of_layers_keeps_the_first_and_some_of_the_last(kept: int, layers: tuple[int, ...]) -> None:
    assert choose_layers(30, kept) == layers


@pytest.mark.parametrize("more", [["--layers", "0,3"], ["--keep", "4"]])
def test_layers_that_the_model_lacks_are_refused(model: str, data: Callable[[list[Any]], str], more: list[str]) -> None:
    options = DERIVE.parse(["--model", model, "--data", data(ROWS), "--output", "nowhere", *more])
    with pytest.raises(InvalidConfiguration, match=r"beyond the model's last layer, 2|the model has 3"):
        derive.prepare(options)


def job(**settings: Any) -> Job:
    return Job(
        settings=RunSettings(model="m", **settings),
        examples=[EncodedText([1], [2])],
        validation=[],
        data=[],
        digest="d",
    )


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(InvalidConfiguration, match="is not empty"):
        prepare_output(job(), tmp_path, resume=False)


def test_a_run_is_gone_on_with_only_when_asked_and_only_the_same(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert prepare_output(job(), output, resume=False) == 0
    with pytest.raises(InvalidConfiguration, match="--resume goes on with it"):
        prepare_output(job(), output, resume=False)
    assert prepare_output(job(), output, resume=True) == 0
    with pytest.raises(InvalidConfiguration, match=r"--resume: beta was 0\.05 and is 0\.1 now"):
        prepare_output(job(beta=0.1), output, resume=True)
    assert json.loads((output / SETTINGS).read_text())["beta"] == 0.05


def test_a_checkpoint_whose_writer_was_killed_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((50, "{}"), (100, "{}"), (150, '{"half'), (200, None)):
        checkpoint = tmp_path / CHECKPOINTS / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-100"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_progress_shows_accuracy_margin_and_loss(tmp_path: Path) -> None:
    log, file = tmp_path / "log.jsonl", io.StringIO()
    with progress(log, total=3, num_done=0, file=file):
        lines = [{"step": i, "loss": 0.5, "accuracy": 0.75, "margin": 2.0} for i in (1, 2, 3)]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "half')
    assert "3/3" in file.getvalue()
    assert "loss 0.500, accuracy 0.750, margin 2.000" in file.getvalue()


class WorkersFailed(Exception):
    """As Ray Train raises it."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("Training failed")
        self.worker_failures = {0: failure}


def test_running_out_of_memory_is_told_with_rays_figures() -> None:
    figures = "Task was killed: 22.1GB / 23.5GB used (0.94), threshold 0.9\nPID 7: 15.3GB\nRefer to the documentation"
    told = training._reason(WorkersFailed(OutOfMemoryError(figures)))
    assert "lower --micro-batch" in told
    assert figures in told
    assert training._reason(WorkersFailed(ValueError("way\nthere\nKeyError: 'x'"))) == "KeyError: 'x'"
