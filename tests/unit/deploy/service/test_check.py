"""A mistake in deploy.yaml is found before anything starts, and its path is named."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.settings import CHECKOUT
from cluster.errors import InvalidConfiguration
from deploy.cli import keys
from deploy.service.capacity import Machine, shortages
from deploy.service.check import check
from tests import tiny

Config = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.save(tiny.llama(80), root / "base")
    tiny.save(tiny.llama(80, seed=1), root / "kind")
    other = tiny.tokenizer(60)
    swapped = other.backend_tokenizer.to_str().replace('"e":8,', '"\\u00e9":8,')
    other._tokenizer = other.backend_tokenizer.from_str(swapped)
    tiny.save(tiny.llama(60), root / "other", with_tokenizer=other)
    return root


@pytest.fixture
def config(models: Path) -> Config:
    """The shipped deploy.yaml with tiny models."""
    config: Config = yaml.safe_load((CHECKOUT / "deploy.yaml").read_text())
    for application in config["applications"]:
        args = application["args"]
        if "model" in args:
            args["model"] = str(models / ("kind" if "base" in args else "base"))
            args["max_context"] = 64
        if "base" in args:
            args["base"] = str(models / "base")
    return config


def applications(config: Config) -> dict[str, Config]:
    return {application["name"]: application for application in config["applications"]}


def test_the_shipped_file_is_fine(config: Config) -> None:
    check(config)


def at(path: str) -> Callable[[Config, Any], None]:
    """A change of one key: `trimtab-base.args.dtype`."""

    def change(config: Config, value: Any) -> None:
        name, *keys = path.split(".")
        place: Any = applications(config)[name]
        for key in keys[:-1]:
            place = place[int(key) if key.isdigit() else key]
        if value is KeyError:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("trimtab-base.args.modle", "x", r"^trimtab-base.args.modle: there is no such key"),
        ("trimtab-base.args.model", KeyError, r"^trimtab-base.args.model: this key is missing"),
        ("trimtab-base.args.dtype", "float8", r"^trimtab-base.args.dtype: .*'bfloat16'.*not 'float8'"),
        ("trimtab-base.args.max_sequences", "many", r"args.max_sequences: .*valid integer, not 'many'"),
        ("trimtab-base.args.max_sequences", 0, r"args.max_sequences: .*greater than or equal to 1, not 0"),
        ("trimtab-base.args.resources.gpu", 1, r"args.resources.gpu: there is no such key"),
        ("trimtab-base.args.max_context", 4096, r"trimtab-base: max_context is 4096, but .* can take 128 tokens"),
        ("trimtab-base.args.tensor_parallel", 0, r"args.tensor_parallel: .*greater than or equal to 1, not 0"),
        (
            "trimtab-base.args.tensor_parallel",
            3,
            r"/base \(trimtab-base\): tensor_parallel is 3, which does not divide",
        ),
        (
            "trimtab-base.args.resources",
            {"gpus": 1, "custom": {"x": 0}},
            r"resources.custom.x: .*greater than 0, not 0",
        ),
        ("trimtab-base.args.resources", {"accelerator_type": "H100"}, r"'H100' places GPUs, .* set gpus"),
        ("trimtab-base.args.resources", {"labels": {"pool": "in(a"}}, r"args.resources.labels: Invalid label selector"),
        (
            "trimtab-base.deployments",
            [{"name": "BaseModel", "ray_actor_options": {}}],
            r"\[BaseModel\].ray_actor_options: set `args",
        ),
        ("trimtab-base.deployments", [{"name": "BaseModel", "max_ongoing_requests": 9}], r"set `args.max_sequences`"),
        (
            "trimtab-base.deployments",
            [{"name": "BaseModel", "autoscaling_config": {"max_replica": 2}}],
            r"^trimtab-base.deployments\[BaseModel\].autoscaling_config.max_replica: there is no such key",
        ),
        (
            "trimtab-base.deployments",
            [{"name": "BaseModel", "autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}],
            r"^trimtab-base.deployments\[BaseModel\].*max_replicas",
        ),
        ("trimtab-base.args.model", "models/nothing", r"no model at /.*/models/nothing .*run `trimtab models`"),
        ("trimtab-base.args.model", "/nowhere/at/all", r"args.model: no model at /nowhere/at/all .*check the path"),
        ("trimtab-base.args.cache_tokens", 32, r"^trimtab-base: cache_tokens is 32, less than max_context, 64"),
        ("trimtab-base.route_prefix", "/base", r"^trimtab-base.route_prefix: '/base', but only 'trimtab' speaks HTTP"),
        ("trimtab-guide-positivity.name", "trimtab-guide-base", r"name: 'base' always means the base model; give the"),
        ("trimtab-guide-positivity.args.resources.cpu", 1, r"args.resources.cpu: .*; did you mean 'cpus'\?"),
        ("trimtab-base.import_path", "deploy.applications:basis", r"import_path: 'deploy.applications:basis' is none"),
        ("trimtab-base.routeprefix", "/x", r"routeprefix: there is no such key"),
        ("trimtab-guide-positivity.args.base", KeyError, r"^trimtab-guide-positivity.args.base: this key is missing"),
        ("trimtab-guide-positivity.args.rows", "hidden", r"args.rows: .*'hidden_states', not 'hidden'"),
        ("trimtab-base.args.rows", "hidden_states", r"args.rows: there is no such key"),
        (
            "trimtab-guide-positivity.name",
            "trimtab-guide-positivty",
            r"no application 'trimtab-guide-positivity'; did you mean 'trimtab-guide-positivty'\?",
        ),
        ("trimtab-base.name", "base", r"there is none called 'trimtab-base'"),
        ("trimtab.args.exchange.transport", "carrier pigeon", r"args.exchange.transport: .*not 'carrier pigeon'"),
        ("trimtab.args.limits.deadline_s", -1, r"args.limits.deadline_s: .*greater than 0, not -1"),
        (
            "trimtab.deployments.0.user_config.profile",
            {},
            r"^trimtab.deployments\[Gateway\].user_config.profile: there is no such",
        ),
        ("trimtab.deployments.0.user_config.profiles", {"base": {}}, r"'base' always means no guidance"),
        ("trimtab.deployments.0.user_config.guides", ["base"], r"user_config.*: guides: 'base' always means the base"),
        ("trimtab.deployments.0.user_config.profiles", {"x": {"kin": 1.0}}, r"profiles.x: there is no guide 'kin'"),
        ("trimtab.deployments.0.user_config.profiles", {"x": {"positivity": float("inf")}}, r"finite"),
        ("trimtab.deployments.0.user_config.profiles", {"x y": {}}, r"user_config.profiles"),
        (
            "trimtab.deployments.0.num_replica",
            2,
            r"^trimtab.deployments\[Gateway\].num_replica: there is no such key; did you mean 'num_replicas'\?",
        ),
        (
            "trimtab.deployments.0.name",
            "Gatewy",
            r"^trimtab.deployments\[Gatewy\].name: 'Gatewy' is none of .*; did you mean 'Gateway'\?",
        ),
        ("trimtab.deployments", [], r"the deployment 'Gateway' of 'trimtab' needs a user_config"),
    ],
)
def test_a_mistake_is_named_by_its_path(config: Config, path: str, value: Any, says: str) -> None:
    config = copy.deepcopy(config)
    at(path)(config, value)
    with pytest.raises(InvalidConfiguration, match=says):
        check(config)


def test_every_deployment_takes_serves_own_options_for_scaling(config: Config) -> None:
    config = copy.deepcopy(config)
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 16, "downscale_delay_s": 60}
    base, guide, _, trimtab = config["applications"]
    base["deployments"] = [{"name": "BaseModel", "num_replicas": 2, "max_replicas_per_node": 1}]
    guide["deployments"] = [{"name": "Guide", "autoscaling_config": scaling}]
    for deployment in trimtab["deployments"]:
        deployment |= {"autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 1, "resources": {"x": 1}}}
    check(config)


def test_gateway_and_coordinator_must_agree(config: Config) -> None:
    config = copy.deepcopy(config)
    applications(config)["trimtab"]["deployments"][1]["user_config"] = {"guides": []}
    with pytest.raises(InvalidConfiguration, match="Gateway and Coordinator need the same user_config"):
        check(config)


def test_a_guide_with_another_tokenizer_is_refused_by_its_first_differing_token(config: Config, models: Path) -> None:
    config = copy.deepcopy(config)
    applications(config)["trimtab-guide-positivity"]["args"]["model"] = str(models / "other")
    with pytest.raises(
        InvalidConfiguration, match="guide 'positivity' has another tokenizer than the base: token 8 is"
    ):
        check(config)


UNREADABLE = {
    "rope type 'su'": {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
    "rope type 'yarn2'": {"rope_parameters": {"rope_type": "yarn2", "rope_theta": 1e4}},
    "KeyError": {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "bitsandbytes.*8": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "integer modulo by zero": {"num_attention_heads": 0},
    "expected int, got str": {"hidden_size": "big"},
    "layer_types": {"layer_types": ["none", "of", "these"]},
    "nonsense": {"model_type": "nonsense"},
}


@pytest.mark.parametrize("name", ["trimtab-base", "trimtab-guide-positivity"])
@pytest.mark.parametrize(("says", "changes"), UNREADABLE.items())
def test_a_model_that_cannot_be_loaded_is_told_in_a_sentence(
    config: Config, tmp_path: Path, name: str, says: str, changes: Config
) -> None:
    args = applications(config)[name]["args"]
    shutil.copytree(args["model"], tmp_path / "odd")
    file = tmp_path / "odd" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    args["model"] = str(tmp_path / "odd")
    with pytest.raises(InvalidConfiguration, match=rf"(?s)^{name}: args.model: the model '/.*/odd' .*{says}"):
        check(config)


@pytest.mark.parametrize("name", ["trimtab-base", "trimtab-guide-positivity"])
@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_a_model_without_a_tokenizer_is_told_in_a_sentence(
    config: Config, tmp_path: Path, name: str, content: str | None
) -> None:
    args = applications(config)[name]["args"]
    shutil.copytree(args["model"], tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    if content is not None:
        (tmp_path / "bare" / "tokenizer.json").write_text(content)
    args["model"] = str(tmp_path / "bare")
    with pytest.raises(
        InvalidConfiguration, match=rf"^{name}: args.model: '/.*/bare' cannot be .*tokenizer.*[Cc]opy tokenizer.json"
    ):
        check(config)


def test_a_guide_for_another_base_is_refused(config: Config, models: Path) -> None:
    config = copy.deepcopy(config)
    applications(config)["trimtab-guide-positivity"]["args"]["base"] = str(models / "kind")
    with pytest.raises(
        InvalidConfiguration, match=r"trimtab-guide-positivity: base is /.*/kind, but .* serves /.*/base"
    ):
        check(config)


def test_hidden_states_of_a_family_that_is_not_tested_are_refused(config: Config, tmp_path: Path) -> None:
    args = applications(config)["trimtab-guide-positivity"]["args"]
    args["rows"] = "hidden_states"
    check(config)
    shutil.copytree(args["model"], tmp_path / "other")
    settings = tmp_path / "other" / "config.json"
    settings.write_text(settings.read_text().replace('"model_type": "llama"', '"model_type": "cohere"'))
    args["model"] = str(tmp_path / "other")
    with pytest.raises(InvalidConfiguration, match=r"\(trimtab-guide-positivity\): hidden .*'cohere'.*`rows: logits`"):
        check(config)


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"gpus": 0.5}, r"args: resources.gpus: 0.5, but each of the 2 ranks takes one GPU"),
        ({"cpus": 0}, r"args: resources: Ray cannot place ranks that take nothing"),
    ],
)
def test_ranks_need_resources_of_their_own(config: Config, resources: Config, says: str) -> None:
    args = applications(config)["trimtab-base"]["args"]
    args |= {"tensor_parallel": 2}
    check(config)
    args["resources"] = resources
    with pytest.raises(InvalidConfiguration, match=says):
        check(config)


def test_a_model_that_cannot_be_sharded_is_refused(config: Config, tmp_path: Path) -> None:
    args = applications(config)["trimtab-guide-positivity"]["args"]
    args |= {"model": tiny.save(tiny.gpt2(80), tmp_path / "gpt2"), "tensor_parallel": 2}
    with pytest.raises(
        InvalidConfiguration, match=r"/gpt2 \(trimtab-guide-positivity\): .* no sharding plan for the family 'gpt2'"
    ):
        check(config)


def test_a_top_level_key_that_is_misspelt_is_named(config: Config) -> None:
    with pytest.raises(InvalidConfiguration, match=r"^http_option: there is no such key"):
        check({**config, "http_option": {}})


@pytest.mark.parametrize("port", [0, -1, 65536, 80000])
def test_a_number_that_is_no_port_is_refused(config: Config, port: int) -> None:
    with pytest.raises(InvalidConfiguration, match=rf"^http_options.port: {port} is no port; give 1 to 65535"):
        check({**config, "http_options": {"host": "127.0.0.1", "port": port}})


@pytest.fixture
def copied(config: Config, tmp_path: Path) -> Path:
    """The directory of a guide's model, for this test alone."""
    args = applications(config)["trimtab-guide-positivity"]["args"]
    args["model"] = str(shutil.copytree(args["model"], tmp_path / "kind"))
    check(config)
    return Path(args["model"])


def refuse(config: Config, says: str) -> None:
    with pytest.raises(InvalidConfiguration, match=says):
        check(config)


def test_a_directory_without_weights_is_refused(config: Config, copied: Path) -> None:
    weights = copied / "model.safetensors"
    parts = {"model.embed_tokens.weight": "part-1.safetensors", "lm_head.weight": "part-2.safetensors"}
    weights.rename(copied / "part-1.safetensors")
    refuse(
        config,
        r"^trimtab-guide-positivity: args.model: /.*/kind has no weights \(model.safetensors, or .*\); copy them there",
    )
    (copied / "pytorch_model.bin").touch()
    refuse(config, r"/kind has no weights .*; save pytorch_model.bin as safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    refuse(config, r"/kind lacks 1 of its 2 files of weights, part-2.safetensors first")
    (copied / "model.safetensors.index.json").write_text("[]")
    refuse(config, r"/kind/model.safetensors.index.json cannot be read")


def test_an_adapter_and_a_path_that_is_misspelt_are_refused_with_what_to_do(config: Config, copied: Path) -> None:
    args = applications(config)["trimtab-guide-positivity"]["args"]
    args["model"] = str(copied.with_name("knid"))
    refuse(config, rf"args.model: no model at /.*/knid .*; did you mean {copied}\?")
    (copied / "config.json").rename(copied / "adapter_config.json")
    args["model"] = str(copied)
    refuse(config, r"args.model: no model at .*/kind .*; it is an adapter: merge it into its base model")


def test_a_path_that_looks_like_a_hub_id_is_recognised(
    config: Config, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "kind", tmp_path / "models" / "positivity")
    monkeypatch.setattr("deploy.service.model_files.START", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    applications(config)["trimtab-guide-positivity"]["args"]["model"] = "modles/positivity"
    refuse(config, r"(?s)the model 'modles/positivity' cannot be read: .*; did you mean 'models/positivity'\?")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", "many", r"the model .*/kind' cannot be read: .*'hidden_size' expected int, got str"),
        ("num_attention_heads", 0, r"ZeroDivisionError"),
        ("rope_parameters", {"rope_type": "su", "rope_theta": 1e4}, r"rope type 'su'"),
        ("hidden_act", "none", r"KeyError"),
        ("model_type", "bert", r"model /.*/kind \(Bert.*\): the engine cannot run it: its attention mask is neither"),
    ],
)
def test_a_model_that_the_engine_cannot_run_is_refused(
    config: Config, copied: Path, key: str, value: Any, says: str
) -> None:
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, key: value}))
    refuse(config, rf"(?s)^trimtab-guide-positivity: .*{says}")


SMALL = Machine(cpus=2, gpus=0, memory_bytes=2**34)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        (
            {"resources": {"cpus": 64}},
            [
                r"trimtab-base.args.resources.cpus: 64, but this machine has 2; Ray never",
                r"the models take 64.5 cpus together, and this machine has 2; without other nodes",
            ],
        ),
        ({"resources": {"cpus": 1.8}}, [r"the models take 2.3 cpus together"]),
        ({"resources": {"cpus": 1}, "tensor_parallel": 2}, [r"the models take 2.5 cpus together"]),
        (
            {"resources": {"gpus": 8}},
            [r"args.resources.gpus: 8, but this machine has 0; Ray", r"take 8 gpus together, and this machine has 0"],
        ),
        ({"resources": {"cpus": 64, "custom": {"large_node": 1}}}, []),
        ({"resources": {"cpus": 64, "labels": {"pool": "base"}}}, []),
        (
            {"cache_tokens": 160_000_000},
            [r"trimtab-base.args.cache_tokens: 160,000,000 tokens take .* GiB, but .* has 16.0 GiB of memory; at most"],
        ),
    ],
)
def test_what_a_machine_lacks_is_a_warning(config: Config, changes: Config, says: list[str]) -> None:
    config = copy.deepcopy(config)
    applications(config)["trimtab-base"]["args"] |= changes
    warnings = list(shortages(*check(config), SMALL))
    assert len(warnings) == len(says)
    for warning, pattern in zip(warnings, says, strict=True):
        assert re.search(pattern, warning), warning


def test_replicas_count_one_by_one(config: Config) -> None:
    config = copy.deepcopy(config)
    base, guide = applications(config)["trimtab-base"], applications(config)["trimtab-guide-positivity"]
    base["deployments"] = [{"name": "BaseModel", "num_replicas": 3}]
    guide["deployments"] = [{"name": "Guide", "autoscaling_config": {"min_replicas": 2, "max_replicas": 9}}]
    (warning,) = shortages(*check(config), SMALL)
    assert warning.startswith("the models take 2.25 cpus together")


@pytest.mark.parametrize("http_options", [{"port": 8000}, {"host": "0.0.0.0"}, {"host": "::"}])
def test_a_public_address_needs_keys(config: Config, http_options: Config, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    config["http_options"] = http_options
    with pytest.raises(InvalidConfiguration, match=r"http_options.host: (0.0.0.0|::) can be reached by others, and"):
        check(config)
    args = applications(config)["trimtab"]["args"]
    args["security"] = {"allow_public_without_keys": True}
    check(config)
    args["security"] = {"keys_file": str(tmp_path / "keys.yaml")}
    with pytest.raises(InvalidConfiguration, match=r"keys.yaml cannot be read: No such file"):
        check(config)
    keys.add(tmp_path / "keys.yaml", "alice")
    check(config)


def test_the_command_exits_with_the_mistake(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    at("trimtab-base.args.modle")(config, "x")
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "check", file], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "trimtab-base.args.modle: there is no such key; did you mean 'model'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_warns_of_what_this_machine_lacks(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    at("trimtab-base.args.resources")(config, {"cpus": 100_000})
    file.write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "check", file],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: trimtab-base.args.resources.cpus: 100000, but this machine has " in done.stderr
    assert done.stdout == f"{file}: fine, but for what this machine lacks\n"
