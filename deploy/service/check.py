"""Whether a deploy.yaml can work, before anything starts.

Serve starts each application by itself, so that a mistake in one would be found while others load their models. This
finds the first mistake in any of them, by its path, in seconds and without loading a model. What this machine lacks is
a warning, since other nodes may have it.
"""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from actors.engine.models.lm_head import check_family
from actors.engine.models.sharding import check_shardable
from actors.guidance import check_vocabulary
from actors.names import BASE, BASE_MODEL, COORDINATOR, GATEWAY, GUIDE, TRIMTAB, guide_application, guide_of
from actors.settings import (
    NO_GUIDANCE,
    BaseModelSettings,
    CoordinatorSettings,
    GuidanceSettings,
    GuideSettings,
)
from actors.vocabularies import load_tokenizer, read_vocabulary
from cluster.errors import InvalidConfiguration
from deploy.http.access.exposure import is_loopback
from deploy.http.access.keys import KeyRing
from deploy.planning.models import read_shape
from deploy.service.model_files import check_weights, read_config
from deploy.service.validation import nearest, unknown_keys
from deploy.service.validation import validate as validate

APPLICATIONS: Mapping[str, tuple[type[BaseModel], set[str]]] = {
    "deploy.applications:base": (BaseModelSettings, {BASE_MODEL}),
    "deploy.applications:guide": (GuideSettings, {GUIDE}),
    "deploy.applications:trimtab": (CoordinatorSettings, {GATEWAY, COORDINATOR}),
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


MAX_PORT = 65535


def check(config: object) -> tuple[ServeDeploySchema, Mapping[str, BaseModel]]:
    """Check the whole of a parsed deploy.yaml; return it as `parse` does.

    Raises:
        InvalidConfiguration: the first thing that cannot work, with its path in the file and the remedy.
    """
    schema, settings = parse(config)
    _check_security(schema, settings[TRIMTAB])
    _check_models(settings)
    return schema, settings


def parse(config: object) -> tuple[ServeDeploySchema, Mapping[str, BaseModel]]:
    """Return a parsed deploy.yaml as Serve reads it and the args of its applications by name, without their models.

    Raises:
        InvalidConfiguration: the first thing that cannot work, whatever the models and keys are.
    """
    for complaint in unknown_keys("", ServeDeploySchema, config):
        raise InvalidConfiguration(complaint)
    schema = validate("", ServeDeploySchema, config)
    if not 1 <= schema.http_options.port <= MAX_PORT:
        raise InvalidConfiguration(f"http_options.port: {schema.http_options.port} is no port; give 1 to {MAX_PORT}")
    settings: dict[str, BaseModel] = {}
    for application in schema.applications:
        path = application.name
        if application.import_path not in APPLICATIONS:
            known = ", ".join(APPLICATIONS)
            raise InvalidConfiguration(
                f"{path}.import_path: {application.import_path!r} is none of Trimtab's applications; they are: {known}"
            )
        model, names = APPLICATIONS[application.import_path]
        if model is not CoordinatorSettings and application.route_prefix is not None:
            raise InvalidConfiguration(
                f"{path}.route_prefix: {application.route_prefix!r}, but only {TRIMTAB!r} speaks HTTP; set it to null"
            )
        if application.name == guide_application(NO_GUIDANCE):
            raise InvalidConfiguration(
                f"{path}.name: {NO_GUIDANCE!r} always means the base model; give the guide another name"
            )
        settings[application.name] = validate(f"{path}.args", model, application.args)
        for deployment in application.deployments:
            where = f"{path}.deployments[{deployment.name}]"
            if deployment.name not in names:
                raise InvalidConfiguration(
                    f"{where}.name: {deployment.name!r} is none of {sorted(names)}{nearest(deployment.name, names)}"
                )
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


def _check_guides(schema: ServeDeploySchema, settings: Mapping[str, BaseModel]) -> None:
    """Check that the applications fit together."""
    for name in (BASE, TRIMTAB):
        if name not in settings:
            raise InvalidConfiguration(f"applications: there is none called {name!r}{nearest(name, settings)}")
    configured: dict[str, Any] = {}
    for application in schema.applications:
        if application.name == TRIMTAB:
            configured = {deployment.name: deployment.user_config for deployment in application.deployments}
    for name in (GATEWAY, COORDINATOR):
        guidance = configured.get(name)
        if not isinstance(guidance, dict):
            raise InvalidConfiguration(
                f"applications: the deployment {name!r} of {TRIMTAB!r} needs a user_config with guides and profiles"
            )
        for guide in guidance.get("guides", ()):
            if guide_application(guide) not in settings:
                raise InvalidConfiguration(
                    f"applications: the user_config of {name!r} names the guide {guide!r}, "
                    f"but there is no application {guide_application(guide)!r}"
                    f"{nearest(guide_application(guide), settings)}"
                )
    if configured[GATEWAY] != configured[COORDINATOR]:
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
    vocabulary = read_vocabulary(base.model, _check_model(BASE, base))
    for name, guide in settings.items():
        if isinstance(guide, GuideSettings):
            if guide.base != base.model:
                raise InvalidConfiguration(f"{name}: base is {guide.base}, but {BASE} serves {base.model}")
            check_vocabulary(
                vocabulary,
                read_vocabulary(guide.model, _check_model(name, guide)),
                guide_name=guide_of(name),
            )


def _check_model(name: str, args: BaseModelSettings) -> Any:
    """Check one application's model; return its tokenizer."""
    try:
        check_weights(args.model)
        config = read_config(args.model)
        tokenizer = load_tokenizer(args.model)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{name}: args.model: {error}") from error
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and args.max_context > longest:
        raise InvalidConfiguration(
            f"{name}: max_context is {args.max_context}, but {args.model} can take {longest} tokens"
        )
    if args.cache_tokens is not None and args.cache_tokens < args.max_context:
        raise InvalidConfiguration(
            f"{name}: cache_tokens is {args.cache_tokens}, less than max_context, {args.max_context}; one sequence "
            "must fit"
        )
    if args.tensor_parallel > 1:
        check_shardable(config, f"{args.model} ({name})", args.tensor_parallel)
    if isinstance(args, GuideSettings) and args.rows == "hidden_states":
        check_family(config, f"{args.model} ({name})")
    try:
        # What the engine would refuse at start.
        read_shape(args.model, max_context=args.max_context)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{name}: args.model: {error}") from error
    return tokenizer
