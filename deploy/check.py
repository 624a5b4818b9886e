"""Check a deploy.yaml before anything starts: `python -m deploy.check deploy.yaml`.

Serve starts each application by itself, so that a mistake in one would be found while others load their models. This
finds the first mistake in any of them, by its path, in seconds and without loading a model.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, ServeDeploySchema
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers import AutoHfQuantizer

from actors.engine.output import check_family
from actors.engine.sharding import check_shardable
from actors.guidance import check_vocabulary
from actors.settings import BaseModelSettings, CoordinatorSettings, GuidanceSettings, GuideSettings
from actors.vocabularies import load_tokenizer, read_vocabulary
from cluster.errors import InvalidConfiguration
from deploy.access.exposure import is_loopback
from deploy.access.keys import KeyRing

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=BaseModel)

BASE = "trimtab-base"
GUIDE = "trimtab-guide-"
TRIMTAB = "trimtab"

ROPE_TYPES = ("default", *sorted({*ROPE_INIT_FUNCTIONS} - {"default"}))

APPLICATIONS: Mapping[str, tuple[type[BaseModel], set[str]]] = {
    "deploy.applications:base": (BaseModelSettings, {"BaseModel"}),
    "deploy.applications:guide": (GuideSettings, {"Guide"}),
    "deploy.applications:trimtab": (CoordinatorSettings, {"Gateway", "Coordinator"}),
}
"""The settings and the deployments of each application, by import path."""

OVERRIDES: Mapping[str, str] = {
    "max_ongoing_requests": "`args.max_sequences`",
    "placement_group_bundles": "`args.resources` and `args.tensor_parallel`",
    "placement_group_strategy": "`args.resources` and `args.tensor_parallel`",
    "ray_actor_options": "`args.resources`",
    "user_config": "`args`",
}
"""Options of Serve's that the deployments of models do not take, and what to set instead."""


def check(config: object) -> None:
    """Check the whole of a parsed deploy.yaml.

    Raises:
        InvalidConfiguration: the first thing that cannot work, with its path in the file and the remedy.
    """
    schema, settings = parse(config)
    _check_security(schema, settings[TRIMTAB])
    _check_models(settings)


def parse(config: object) -> tuple[ServeDeploySchema, Mapping[str, BaseModel]]:
    """Return a parsed deploy.yaml as Serve reads it and the args of its applications by name, without their models.

    Raises:
        InvalidConfiguration: the first thing that cannot work, whatever the models and keys are.
    """
    for path in _unknown_keys("", ServeDeploySchema, config):
        raise InvalidConfiguration(f"{path}: there is no such key")
    schema = validate("", ServeDeploySchema, config)
    settings: dict[str, BaseModel] = {}
    for number, application in enumerate(schema.applications):
        path = f"applications[{number}]"
        if application.import_path not in APPLICATIONS:
            known = ", ".join(APPLICATIONS)
            raise InvalidConfiguration(
                f"{path}.import_path: {application.import_path!r} is none of Trimtab's applications; they are: {known}"
            )
        model, names = APPLICATIONS[application.import_path]
        settings[application.name] = validate(f"{path}.args", model, application.args)
        for index, deployment in enumerate(application.deployments):
            where = f"{path}.deployments[{index}]"
            if deployment.name not in names:
                raise InvalidConfiguration(f"{where}.name: {deployment.name!r} is none of {sorted(names)}")
            scaling = deployment.autoscaling_config
            if isinstance(scaling, dict):
                validate(f"{where}.autoscaling_config", AutoscalingConfig, scaling)
            if model is not CoordinatorSettings:
                _check_overrides(where, deployment)
            elif isinstance(deployment.user_config, dict):
                validate(f"{where}.user_config", GuidanceSettings, deployment.user_config)
    _check_guides(schema, settings)
    return schema, settings


def _check_overrides(path: str, deployment: DeploymentSchema) -> None:
    """Refuse what would take the place of options that Trimtab makes out of a model's args."""
    for key in deployment.model_dump(exclude_unset=True):
        if key in OVERRIDES:
            raise InvalidConfiguration(f"{path}.{key}: set {OVERRIDES[key]}, of which Trimtab makes it")


def _unknown_keys(path: str, model: type[BaseModel], value: object) -> Iterator[str]:
    """Yield the paths of keys that Serve's own schema does not have; Serve itself ignores them."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        where = f"{path}.{key}" if path else str(key)
        if key not in model.model_fields:
            yield where
            continue
        annotation = model.model_fields[key].annotation
        for part in (annotation, *get_args(annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                if isinstance(inner, list):
                    for number, item in enumerate(inner):
                        yield from _unknown_keys(f"{where}[{number}]", part, item)
                else:
                    yield from _unknown_keys(where, part, inner)


def validate(path: str, model: type[Settings], value: object) -> Settings:
    """Return a group of settings out of parsed YAML.

    Raises:
        InvalidConfiguration: each complaint with its path, which begins with `path`.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidConfiguration("\n".join(_complaints(path, error))) from error


def _complaints(path: str, error: ValidationError) -> Iterator[str]:
    for complaint in error.errors():
        where = path
        for part in complaint["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
        if complaint["type"] == "extra_forbidden":
            yield f"{where}: there is no such key"
        elif complaint["type"] == "missing":
            yield f"{where}: this key is missing"
        elif complaint["type"] == "value_error":
            yield f"{where}: {complaint['ctx']['error']}"
        else:
            yield f"{where}: {complaint['msg']}, not {complaint['input']!r}"


def _check_guides(schema: ServeDeploySchema, settings: Mapping[str, BaseModel]) -> None:
    """Check that the applications fit together."""
    for name in (BASE, TRIMTAB):
        if name not in settings:
            raise InvalidConfiguration(f"applications: there is none called {name!r}")
    configured: dict[str, Any] = {}
    for application in schema.applications:
        if application.name == TRIMTAB:
            configured = {deployment.name: deployment.user_config for deployment in application.deployments}
    for name in ("Gateway", "Coordinator"):
        guidance = configured.get(name)
        if not isinstance(guidance, dict):
            raise InvalidConfiguration(
                f"applications: the deployment {name!r} of {TRIMTAB!r} needs a user_config with guides and profiles"
            )
        for guide in guidance.get("guides", ()):
            if GUIDE + guide not in settings:
                raise InvalidConfiguration(
                    f"applications: the user_config of {name!r} names the guide {guide!r}, "
                    f"but there is no application {GUIDE + guide!r}"
                )
    if configured["Gateway"] != configured["Coordinator"]:
        raise InvalidConfiguration("applications: Gateway and Coordinator need the same user_config")


def _check_security(schema: ServeDeploySchema, settings: BaseModel) -> None:
    """Check that the keys can be read, and that strangers need one where they can reach the service."""
    assert isinstance(settings, CoordinatorSettings)
    keys = KeyRing.load(settings.security, os.environ)
    host = schema.http_options.host
    if keys is None and not settings.security.allow_public_without_keys and not is_loopback(host):
        raise InvalidConfiguration(
            f"http_options.host: {host} can be reached by others, and nobody needs a key; set it to 127.0.0.1, name "
            f"keys in security.keys_file of {TRIMTAB!r}, or set its security.allow_public_without_keys to true"
        )


def _check_models(settings: Mapping[str, BaseModel]) -> None:
    """Check that models can be read, have enough context, and that the guides' vocabularies fit the base's."""
    base = settings[BASE]
    assert isinstance(base, BaseModelSettings)
    for name, model in settings.items():
        if isinstance(model, BaseModelSettings):
            path = f"{name}: args.model: the model {model.model!r}"
            model_config = _read_config(path, model.model)
            longest = getattr(model_config, "max_position_embeddings", None)
            if longest is not None and model.max_context > longest:
                raise InvalidConfiguration(
                    f"{name}: max_context is {model.max_context}, but {model.model} can take {longest} tokens"
                )
            try:
                load_tokenizer(model.model)
            except InvalidConfiguration as error:
                raise InvalidConfiguration(f"{name}: args.model: {error}") from error
            if model.tensor_parallel > 1:
                check_shardable(model_config, f"{model.model} ({name})", model.tensor_parallel)
        if isinstance(model, GuideSettings):
            if model.base != base.model:
                raise InvalidConfiguration(f"{name}: base is {model.base}, but {BASE} serves {base.model}")
            if model.rows == "hidden_states":
                check_family(model_config, f"{model.model} ({name})")
            check_vocabulary(
                read_vocabulary(model.base, load_tokenizer(model.base)),
                read_vocabulary(model.model, load_tokenizer(model.model)),
                guide_name=name.removeprefix(GUIDE),
            )


def _read_config(path: str, model: str) -> Any:
    """The configuration of a model that can be loaded here, as far as it says; `path` begins the message if it cannot.

    Raises:
        InvalidConfiguration: it cannot be read, or asks for what is not there.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever a configuration makes it: KeyError, ZeroDivisionError, errors of validators.
        told = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise InvalidConfiguration(f"{path} cannot be read: {told}; mend its config.json") from error
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        try:
            AutoHfQuantizer.from_config(quantization).validate_environment()
        except (ImportError, ValueError) as error:
            raise InvalidConfiguration(
                f"{path} is quantised in a way that cannot be read here: {error}; give the model as it was before, "
                "or install what is missing on every node"
            ) from error
        except RuntimeError as error:
            logger.warning("%s is quantised: %s; the nodes that serve it may have what this machine lacks", path, error)
    for rope_type in _rope_types(getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}):
        if rope_type not in ROPE_TYPES:
            raise InvalidConfiguration(
                f"{path} cannot be read: config.json has the rope type {rope_type!r}, which is none of "
                f"{', '.join(ROPE_TYPES)}; save the model with a newer transformers ('su' is now 'longrope')"
            )
    return config


def _rope_types(parameters: Mapping[str, Any]) -> list[str]:
    """The types of rotary positions, of all layers or of each kind of layer."""
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [group["rope_type"] for group in groups if "rope_type" in group]


def main() -> None:
    """Check the file named on the command line; exit 1 with the first mistake."""
    parser = argparse.ArgumentParser(description="Check a deploy.yaml without starting anything.")
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    try:
        check(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, InvalidConfiguration) as error:
        sys.exit(f"{file}: {error}")
    print(f"{file}: fine")


if __name__ == "__main__":
    main()
