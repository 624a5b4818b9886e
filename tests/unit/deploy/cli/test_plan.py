"""The planner's arithmetic, by figures that were worked out by hand, and its command."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, T5Config

from actors.settings import CHECKOUT
from cluster.errors import InvalidConfiguration
from deploy.cli import plan
from deploy.planning.advice import advise, grow
from deploy.planning.estimate import (
    attention_s,
    cache_bytes,
    capacity,
    coordinator_s,
    estimate,
    exchange_s,
    is_fitting,
    model_step_s,
    products_s,
    ranks_s,
    weight_bytes,
    with_guide,
)
from deploy.planning.hardware import ACCELERATORS, SHARED_MEMORY, Accelerator, Link, network
from deploy.planning.measure import this_machine
from deploy.planning.models import Shape, read_shape, shape_of
from deploy.planning.service import Model, Service
from tests import tiny

LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA)
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
)

GPU = Accelerator(
    name="gpu",
    memory_gb=100,
    memory_gb_s=1000,
    tflops={"bfloat16": 100.0},
    link_gb_s=100,
    bandwidth_share=1.0,
    tflops_share=0.5,
    layer_s=0.0,
    source="made up",
)
SHAPE = Shape(
    parameters=1_100_000_000,
    read_parameters=1_000_000_000,
    layers=10,
    hidden=1000,
    vocabulary=50_000,
    cache_per_token=20_000,
    cache_heads=8,
    can_be_sharded=True,
)
LINK = Link(name="wire", fixed_s=1e-3, bytes_per_s=1e9)


def model(name: str = "base", **changes: Any) -> Model:
    settings: dict[str, Any] = {
        "shape": SHAPE,
        "dtype": "bfloat16",
        "rows": "logits",
        "accelerator": GPU,
        "max_sequences": 64,
        "max_context": 4096,
        "cache_tokens": 16_000,
        "link": LINK,
        "node": name,
    }
    return Model(name=name, **{**settings, **changes})


@pytest.mark.parametrize(
    ("config", "parameters", "read", "cache"),
    [
        # Published counts; the embedding table is not read, and 2 * 8 heads * 128 numbers are kept in each layer.
        (LLAMA_8B, 8_030_261_248, 8_030_261_248 - 128256 * 4096, 32 * 2 * 8 * 128),
        (LLAMA_70B, 70_553_706_496, 70_553_706_496 - 128256 * 8192, 80 * 2 * 8 * 128),
        # Tied: the table is the output matrix.
        (GPT2Config(), 124_439_808, 124_439_808, 12 * 2 * 12 * 64),
    ],
)
def test_a_model_is_measured_by_its_configuration(config: Any, parameters: int, read: int, cache: int) -> None:
    shape = shape_of(config, max_context=1024)
    assert (shape.parameters, shape.read_parameters, shape.cache_per_token) == (parameters, read, cache)
    assert shape.can_be_sharded == (config.model_type == "llama")


def test_a_configuration_says_as_much_as_the_model(tmp_path: Path) -> None:
    directory = tiny.save(tiny.gemma2(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    (tmp_path / "model.safetensors").unlink()
    assert read_shape(directory, max_context=64).parameters == loaded.num_parameters()


def test_what_the_engine_cannot_run_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="'t5' model is no causal language model"):
        shape_of(T5Config(), max_context=64)
    with pytest.raises(InvalidConfiguration, match="the configuration of '/nowhere' cannot be read"):
        read_shape("/nowhere", max_context=64)


def test_memory_is_shared_out_over_ranks() -> None:
    assert weight_bytes(model()) == 2_200_000_000
    assert cache_bytes(model()) == 16_000 * 20_000 * 2
    two = model(tensor_parallel=2)
    assert (weight_bytes(two), cache_bytes(two)) == (1_100_000_000, 16_000 * 20_000)
    assert is_fitting(model())
    assert not is_fitting(model(cache_tokens=2_200_000))  # 2.2 + 88 GB of 90


def test_a_replica_holds_what_its_cache_does() -> None:
    assert capacity(model(), 1000) == 16
    assert capacity(model(), 100) == 64


def test_products_take_the_longer_of_reading_and_computing() -> None:
    # 2 GB at 1000 GB/s; 2 * 10^9 * 64 operations at 50 TFLOP/s.
    assert products_s(model(), 1) == pytest.approx(2e-3)
    assert products_s(model(), 64) == pytest.approx(2.56e-3)
    # Without the output matrix of 5 * 10^7 numbers, and on two ranks.
    assert products_s(model(rows="hidden_states"), 1) == pytest.approx(1.9e-3)
    assert products_s(model(tensor_parallel=2), 1) == pytest.approx(1e-3)


def test_attention_moves_keys_and_values() -> None:
    # 16 sequences of 500 tokens of 40 kB, as often as the device does it.
    gathering = replace(GPU, attention_passes=3)
    assert attention_s(model(accelerator=gathering), 16, 500) == pytest.approx(3 * 16 * 500 * 40e3 / 1e12)


def test_small_operations_add_to_the_large_ones() -> None:
    slow = replace(GPU, layer_s=1e-3)
    large = products_s(model(), 1) + attention_s(model(), 1, 100)
    assert model_step_s(model(accelerator=slow), 1, 100) == pytest.approx(10e-3 + large)


def test_ranks_on_gpus_wait_for_python_and_those_on_processors_do_not() -> None:
    tiny = replace(GPU, memory_gb_s=1e9, tflops={"bfloat16": 1e9})
    sharded = model(accelerator=tiny, tensor_parallel=2)
    assert model_step_s(sharded, 1, 100) == pytest.approx(10 * 300e-6 + ranks_s(sharded, 1), rel=1e-3)
    alone = replace(sharded, tensor_parallel=1)
    assert model_step_s(alone, 1, 100) < 1e-4
    processors = replace(sharded, accelerator=replace(tiny, is_processor=True))
    assert model_step_s(processors, 1, 100) < 1e-4 + ranks_s(processors, 1)


def test_ranks_sum_twice_a_layer() -> None:
    assert ranks_s(model(), 16) == 0
    # 2 * 10 sums: 30 microseconds, and 2 * 3/4 of 16 * 1000 * 2 bytes at 100 GB/s.
    assert ranks_s(model(tensor_parallel=4), 16) == pytest.approx(20 * (30e-6 + 1.5 * 32e3 / 1e11))


def test_rows_travel_over_links() -> None:
    guide = model("kind", rows="hidden_states", replicas=3)
    # 4 rows of 100 kB and of 2 kB at 1 GB/s, a fixed part for each model, two further replicas.
    assert exchange_s([model(), guide], 4) == pytest.approx(2e-3 + 4 * 102e3 / 1e9 + 2 * 0.4e-3)
    assert network(1).bytes_per_s == 125e6
    assert network(1000).bytes_per_s == 1e9


def test_a_coordinator_merges_draws_and_multiplies() -> None:
    alone = Service(base=model(), guides=())
    assert coordinator_s(alone, 10) == pytest.approx(0.6e-3 + 10 * 50_000 * 1.6e-9)
    guided = replace(alone, guides=(model("kind"), model("terse", rows="hidden_states")))
    # One row: reading the matrix of 10^8 bytes at 20 GB/s takes longer than the product.
    assert coordinator_s(guided, 1) == pytest.approx(0.6e-3 + 50_000 * 3.6e-9 + 5e-3)
    assert coordinator_s(guided, 64) == pytest.approx(0.6e-3 + 64 * 50_000 * 3.6e-9 + 2 * 5e7 * 64 / 80e9)


def test_models_on_devices_of_their_own_compute_at_the_same_time() -> None:
    service = Service(base=model(), guides=(model("kind"),))
    one = estimate(service, sequences=16, context=500)
    assert one.models_s == pytest.approx(model_step_s(model(), 16, 500))
    assert one.step_s == pytest.approx(one.models_s + one.exchange_s + one.coordinator_s)
    assert one.tokens_per_s == pytest.approx(16 / one.step_s)
    assert one.models[1].bytes_per_step == 16 * 100_000
    assert one.models[1].bytes_per_s == pytest.approx(one.tokens_per_s * 100_000)


def test_models_on_one_machines_processors_take_turns() -> None:
    processor = replace(GPU, is_processor=True)
    base, guide = model(accelerator=processor), model("kind", accelerator=processor, node="base")
    near = estimate(Service(base=base, guides=(guide,)), sequences=16, context=500)
    far = estimate(Service(base=base, guides=(replace(guide, node="kind"),)), sequences=16, context=500)
    assert near.models_s == pytest.approx(2 * far.models_s)
    crowded = estimate(Service(base=base, guides=(replace(guide, replicas=2),)), sequences=16, context=500)
    assert crowded.models_s > near.models_s


def test_what_finds_no_room_waits_and_the_advice_says_where() -> None:
    service = Service(base=model(max_sequences=20), guides=(model("kind"),))
    now = estimate(service, sequences=100, context=1000)
    assert (now.sequences, now.waiting) == (16, 84)
    assert "84 sequences wait: base holds 16 of 1000 tokens" in next(advise(service, now))
    assert estimate(service, sequences=100, context=500).sequences == 20


def test_a_slow_guide_is_the_bottleneck_and_another_replica_pays() -> None:
    slow = model("kind", accelerator=replace(GPU, memory_gb_s=50))
    service = Service(base=model(), guides=(slow,))
    now = estimate(service, sequences=32, context=500)
    assert now.bottleneck == "kind"
    advice = list(advise(service, now))
    assert any(line.startswith("twice the replicas of kind (2):") and line.endswith(", pays") for line in advice)


def test_a_model_that_does_not_fit_is_told_how_many_gpus_it_needs() -> None:
    large = model(shape=shape_of(LLAMA_70B, max_context=1024), accelerator=ACCELERATORS["h100"])
    service = Service(base=large, guides=())
    # 141.11 GB of weights and 5.24 GB of cache, on 72 GB each.
    said = next(advise(service, estimate(service, sequences=1, context=100)))
    assert "base does not fit: weights and cache are 146.4 GB" in said
    assert "tensor_parallel to 4" in said


def test_hidden_states_pay_on_slow_networks_alone() -> None:
    def verdicts(gbit_s: float) -> str:
        service = Service(base=model(), guides=(model("kind", link=network(gbit_s)),))
        return list(advise(service, estimate(service, sequences=16, context=500)))[-1]

    assert "does not pay; faster on networks below" in verdicts(100)
    assert ", pays" in verdicts(0.1)


def test_a_busy_coordinator_holds_its_lanes_up() -> None:
    service = Service(base=model(replicas=64), guides=(), coordinators=1)
    busy = estimate(service, sequences=64 * 16, context=500)
    assert busy.is_coordinator_full
    assert busy.bottleneck == "coordinator"
    assert busy.coordinator_load == pytest.approx(service.costs.full_share)
    said = next(advise(service, busy))
    assert said.startswith("twice the coordinators (2): 2.00 times the tokens, pays")
    assert estimate(replace(service, coordinators=64), sequences=64 * 16, context=500).step_s < busy.step_s / 5


def test_a_service_grows_to_thousands_of_replicas() -> None:
    slow = model("kind", link=network(10), accelerator=replace(GPU, memory_gb_s=900))
    service = Service(base=model(), guides=(slow,))
    sizes = list(grow(service, estimate(service, sequences=16, context=500), network_gbit_s=10))
    assert [size.base_replicas for size in sizes] == [2**power for power in range(13)]
    for size in sizes:
        assert size.sequences == 16 * size.base_replicas
        assert size.guide_replicas["kind"] >= size.base_replicas
        assert size.gbit_s_per_coordinator <= 10
        assert size.devices == size.base_replicas + size.guide_replicas["kind"]
    assert sizes[-1].tokens_per_s > 2000 * sizes[0].tokens_per_s


def test_a_changed_guide_takes_its_place() -> None:
    service = Service(base=model(), guides=(model("kind"), model("terse")))
    changed = with_guide(service, model("terse", replicas=3))
    assert [guide.replicas for guide in changed.guides] == [1, 3]


def test_this_machine_has_figures() -> None:
    machine = this_machine(dtype="float32", rows=4)
    assert machine.is_processor
    assert 0 < machine.memory_gb_s < 10_000
    assert math.isfinite(machine.tflops["float32"])


@pytest.fixture
def deploy_yaml(tmp_path: Path) -> Path:
    """Of tiny models without weights: a base on two GPUs, a guide on other ones."""
    for name, seed in (("base", 0), ("kind", 1)):
        tiny.save(tiny.llama(80, seed=seed), tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    common = {"dtype": "bfloat16", "max_context": 64, "cache_tokens": 640}
    config = yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    base, guide, _, trimtab = config["applications"]
    gpu = {"gpus": 1, "accelerator_type": "H100"}
    base["args"] = {"model": f"{tmp_path}/base", **common, "tensor_parallel": 2, "resources": gpu}
    guide["args"] = {"model": f"{tmp_path}/kind", "base": f"{tmp_path}/base", **common, "resources": {"gpus": 1}}
    guide["deployments"] = [{"name": "Guide", "autoscaling_config": {"min_replicas": 1, "max_replicas": 3}}]
    for deployment in trimtab["deployments"]:
        deployment["user_config"] = {"guides": ["positivity"]}
        deployment["num_replicas"] = 2
    file = tmp_path / "deploy.yaml"
    file.write_text(yaml.safe_dump({"applications": [base, guide, trimtab]}))
    return file


def test_the_command_plans_a_file(deploy_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(deploy_yaml), "--accelerator", "trimtab-guide-positivity=l4", "--sequences", "6", "--context", "64"]
    plan.main([*command, "--json"])
    planned = json.loads(capsys.readouterr().out)
    base, guide = planned["estimate"]["models"]
    assert (base["accelerator"], base["devices"], base["link"]) == ("h100", 2, SHARED_MEMORY.name)
    assert (guide["accelerator"], guide["replicas"], guide["link"]) == ("l4", 3, "network")
    # 3 layers of 2 * 2 heads * 8 numbers of 2 bytes, over two ranks.
    assert base["cache_bytes"] == 640 * 3 * 2 * 2 * 8 * 2 / 2
    assert planned["estimate"]["coordinators"] == 2
    assert planned["estimate"]["tokens_per_s"] > 0
    plan.main(command)
    text = capsys.readouterr().out
    assert "2 x h100" in text
    assert "NVIDIA L4 data sheet" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "trimtab-guide-positivity: no figures of its GPUs; give `--accelerator trimtab-guide-positivity=NAME`"),
        (
            ["--accelerator", "h100", "--context", "65"],
            "--context: a sequence of base has 64 tokens at most",
        ),
        (["--guides", "kin"], "there is no guide 'kin'; guides are ['positivity']"),
        (["--accelerator", "trimtab-bse=l4"], "there is no application 'trimtab-bse'"),
        (["--accelerator", "h1000"], "trimtab plan: --accelerator: 'h1000' is none of a100-40g, "),
        (["--sequences", "0"], "trimtab plan: --sequences: at least 1, not 0"),
        (["--network-gbit-s", "-1"], "--network-gbit-s: above 0, not -1.0"),
    ],
)
def test_what_cannot_be_planned_is_said(
    deploy_yaml: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([str(deploy_yaml), *options]) == 2
    assert says in capsys.readouterr().err


def test_ranks_must_divide_the_heads(deploy_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(deploy_yaml.read_text())
    config["applications"][0]["args"]["tensor_parallel"] = 3
    deploy_yaml.write_text(yaml.safe_dump(config))
    assert plan.main([str(deploy_yaml), "--accelerator", "h100"]) == 2
    assert "tensor_parallel is 3, which does not divide the 2 key-value heads" in capsys.readouterr().err
