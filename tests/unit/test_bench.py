"""The benchmark's own arithmetic, and that its systems write what they say. No time is asserted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from actors.vocabularies import end_tokens, load_tokenizer
from bench import gpu
from bench.endless import make_endless
from bench.engine import BareEngine
from bench.generate import Generate, Guide
from bench.memory import Growth
from bench.recorder import StepRecord, summarise
from bench.replica import Forward
from bench.run import choose_cells, choose_tokens, parse, report, turned
from bench.steps import measure_steps
from bench.table import REFERENCE, Cell, Sample, Samples, markdown
from bench.worker import remote_system
from bench.workload import Models, Prompts
from tests import tiny

ALONE, GUIDED = Cell(4, 0, REFERENCE), Cell(4, 1, REFERENCE)
HTTP = Cell(4, 1, "http")


def samples() -> Samples:
    """The machine halves its speed in round 2 and the service has a bad round 3."""
    elapsed_s = {ALONE: (1.0, 2.0, 1.0), GUIDED: (2.0, 4.0, 2.0), HTTP: (0.5, 1.0, 4.0)}
    return Samples(
        [Sample(cell, number, 100, times[number - 1]) for number in (1, 2, 3) for cell, times in elapsed_s.items()]
    )


def test_rates_are_medians_over_the_rounds() -> None:
    assert [samples().tokens_per_s(cell) for cell in (ALONE, GUIDED, HTTP)] == [100, 50, 100]
    assert samples().spread(HTTP) == (25, 200)
    # Four sequences, 25 tokens each, in one second.
    assert samples().ms_per_token(HTTP) == 40


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    assert samples().ratio_to_base_alone(HTTP) == 2
    assert samples().ratio_to_same_guides(HTTP) == 4
    assert samples().ratio_to_base_alone(GUIDED) == 0.5


def test_a_ratio_to_what_was_not_measured_is_none() -> None:
    lone = Samples([Sample(HTTP, 1, 10, 1.0), Sample(ALONE, 2, 10, 1.0)])
    assert lone.ratio_to_base_alone(HTTP) is None
    assert lone.ratio_to_same_guides(HTTP) is None
    row = lone.table({REFERENCE: "theirs", "http": "ours"}).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")][-2:] == ["-", "-"]


def test_the_table_has_a_row_for_each_cell_in_order() -> None:
    rows = samples().table({REFERENCE: "theirs", "http": "ours"}).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [["4", "0", "theirs"], ["4", "1", "theirs"], ["4", "1", "ours"]]
    assert cells[2][3:] == ["100.0", "25.0 to 200.0", "40.0", "2.00", "4.00"]
    assert {len(row) for row in rows} == {len(rows[0])}


def test_markdown_puts_numbers_on_the_right() -> None:
    assert markdown(["name", "n"], [["a", "10"], ["b", "-"]]).splitlines() == [
        "| name |  n |",
        "| ---- | -: |",
        "| a    | 10 |",
        "| b    |  - |",
    ]


def step(begin_s: float, gather_s: float, num_items: int, num_tokens: int) -> StepRecord:
    record = StepRecord(begin_s, first_send_s=begin_s + 0.001, last_landing_s=begin_s + 0.001 + gather_s)
    record.num_items, record.num_tokens, record.num_bytes = num_items, num_tokens, 800
    record.parts_s.update({"plan": 0.001, "merge and draw": 0.006, "merge": 0.002, "draw": 0.003, "text": 0.5})
    return record


def test_a_breakdown_counts_full_decoding_steps_only() -> None:
    steps = [
        step(0.0, 9.0, 4, 40),  # prompts
        step(10.0, 0.050, 4, 4),
        step(10.1, 0.050, 4, 4),
        step(10.2, 0.050, 4, 4),
        step(10.3, 9.0, 2, 2),  # one sequence is late
        step(20.0, 9.0, 4, 4),  # nothing follows
    ]
    forwards = [
        [Forward(2, 20, 5.0), *[Forward(2, 2, 0.040)] * 3],
        [Forward(2, 20, 5.0), *[Forward(2, 2, 0.010)] * 3],
    ]
    breakdown = summarise(steps, forwards, num_sequences=2, takes_turns=False)
    assert (breakdown.sequences, breakdown.guides, breakdown.bytes_moved) == (2, 1, 800)
    assert breakdown.step == pytest.approx(100)
    assert (breakdown.base, breakdown.guide) == (40, 10)
    assert breakdown.exchange == pytest.approx(10)
    assert (breakdown.plan, breakdown.merge, breakdown.draw, breakdown.commit) == (1, 2, 3, None)
    assert breakdown.rest == pytest.approx(100 - 50 - 1 - 6)
    in_turn = summarise(steps, forwards, num_sequences=2, takes_turns=True)
    assert in_turn.models == 50
    assert in_turn.exchange == pytest.approx(0)
    with pytest.raises(RuntimeError, match="no step decoded all sequences"):
        summarise(steps[:1], forwards, num_sequences=2, takes_turns=False)


def test_the_systems_take_turns_at_being_first() -> None:
    cells = choose_cells(["a", "b", "c"], [1, 4], [0], every=True)
    orders = [[cell.system for cell in turned(cells, number)] for number in range(3)]
    assert orders == [["a", "b", "c"] * 2, ["b", "c", "a"] * 2, ["c", "a", "b"] * 2]


def test_the_default_leaves_out_what_matters_least() -> None:
    arguments = parse([])
    cells = choose_cells(arguments.systems, arguments.concurrency, arguments.guides, every=False)
    assert {cell.concurrency for cell in cells if cell.num_guides == 4} == {1, 16}
    assert {cell.num_guides for cell in cells if cell.system == "stream"} == {0, 1}
    assert len(choose_cells(arguments.systems, arguments.concurrency, arguments.guides, every=True)) == 64
    assert [choose_tokens(64, c, every=False) for c in (1, 16, 64)] == [64, 64, 32]
    assert choose_tokens(64, 64, every=True) == 64


@pytest.mark.parametrize("wrong", ["--systems=vllm", "--rounds=0", "--concurrency=0,1", "--guides=-1"])
def test_impossible_options_are_refused(wrong: str) -> None:
    with pytest.raises(SystemExit):
        parse([wrong])


def test_growth_is_in_per_cent() -> None:
    assert Growth("replica", 200, 203).percent == pytest.approx(1.5)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    paths = [tmp_path / name for name in ("base", "kind", "terse")]
    for seed, path in enumerate(paths):
        tiny.save(tiny.llama(seed=seed, max_position_embeddings=256), path)
        make_endless(path, tmp_path / "endless" / path.name)
    base, *guides = sorted((tmp_path / "endless").iterdir())
    return Models(
        base=base,
        guides={path.name: path for path in guides},
        dtype="float32",
        threads=1,
        max_sequences=4,
        max_context=256,
    )


def test_an_endless_model_has_no_end_token_and_the_same_weights(models: Models, tmp_path: Path) -> None:
    assert end_tokens(str(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")) == {0}
    assert end_tokens(str(models.base), load_tokenizer(str(models.base))) == frozenset()
    assert GenerationConfig.from_pretrained(models.base).eos_token_id is None
    weights = models.base / "model.safetensors"
    assert weights.resolve() == (tmp_path / "base" / "model.safetensors").resolve()


def test_no_prompt_comes_twice_and_all_are_about_as_long(models: Models) -> None:
    prompts = Prompts(load_tokenizer(str(models.base)))
    batches = [prompts.batch(20, max_tokens=1, num_guides=0) for _ in range(2)]
    texts = [text for batch in batches for text in batch.prompts]
    assert len(set(texts)) == 40
    lengths = prompts.num_tokens(batches[0])
    assert max(lengths) < 1.5 * min(lengths)


@pytest.mark.parametrize("load", [Generate, BareEngine])
@pytest.mark.parametrize("num_guides", [0, 2])
def test_a_system_writes_all_tokens(models: Models, load: Any, num_guides: int) -> None:
    batch = Prompts(load_tokenizer(str(models.base))).batch(3, max_tokens=5, num_guides=num_guides)
    outcome = load(models).run(batch)
    assert outcome.num_tokens == 15
    assert outcome.elapsed_s > 0


@torch.inference_mode()
def test_the_in_process_guide_adds_its_logits_whatever_the_padding() -> None:
    model = tiny.llama(seed=1)
    texts = [[5, 6, 7, 8], [9, 10]]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    guide = Guide(model, 0.5, mask)
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    for new in ([11, 12], [13, 14], [15, 16]):
        scores = guide(ids, torch.ones(2, tiny.VOCABULARY_SIZE))
        for row, tokens in zip(scores, texts, strict=True):
            torch.testing.assert_close(row, 1 + 0.5 * model(torch.tensor([tokens])).logits[0, -1])
        ids = torch.cat([ids, torch.tensor(new)[:, None]], dim=1)
        for tokens, token in zip(texts, new, strict=True):
            tokens.append(token)


def test_steps_are_broken_down_with_real_replicas(models: Models) -> None:
    prompts = Prompts(load_tokenizer(str(models.base)))
    (breakdown,) = measure_steps(models, prompts, concurrency=[2], num_guides=[1], max_tokens=6)
    assert (breakdown.sequences, breakdown.guides) == (2, 1)
    # A row of the base and one of the guide for each sequence.
    assert breakdown.bytes_moved == 2 * 2 * tiny.VOCABULARY_SIZE * 4
    assert breakdown.guide is not None
    assert breakdown.step > max(breakdown.base, breakdown.guide) > 0
    text = report({"cores": "2"}, samples(), [breakdown])
    assert "transformers generate" in text
    assert "MB moved" in text


def test_the_steps_of_guides_that_send_hidden_states_are_broken_down(models: Models) -> None:
    models = replace(models, rows="hidden_states", transport="grpc")
    prompts = Prompts(load_tokenizer(str(models.base)))
    (breakdown,) = measure_steps(models, prompts, concurrency=[2], num_guides=[1], max_tokens=6)
    assert breakdown.bytes_moved == 2 * (tiny.VOCABULARY_SIZE + 32) * 4
    assert breakdown.output is not None
    assert breakdown.output > 0


def test_a_system_in_a_process_of_its_own_answers_and_ends(models: Models) -> None:
    batch = Prompts(load_tokenizer(str(models.base))).batch(2, max_tokens=3, num_guides=1)
    with remote_system(BareEngine, models) as system:
        assert system.run(batch).num_tokens == 6
    with remote_system(BareEngine, models) as system, pytest.raises(RuntimeError, match="has ended"):
        system.run("no batch")  # type: ignore[arg-type]


def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device=cpu", "--base-size=tiny", "--guide-size=tiny", "--context=32", "--sequences=1,2", "--steps=3"]
    result = gpu.main([*options, "--dtype=float32", f"--output={tmp_path}"])
    assert [(figure["model"], figure["sequences"]) for figure in result["figures"]] == [
        (name, sequences) for name in ("base, tiny", "guide, tiny") for sequences in (1, 2)
    ]
    (written,) = tmp_path.glob("gpu-*.json")
    assert json.loads(written.read_text())["figures"] == result["figures"]


def test_the_bytes_of_a_step_are_weights_and_cache() -> None:
    model = tiny.llama()
    embedding = model.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - embedding
    # 3 layers, keys and values, 2 heads of width 8.
    assert gpu.bytes_read(model) == (4 * weights, 4 * 3 * 2 * 2 * 8)
