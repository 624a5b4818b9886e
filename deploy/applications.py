"""The Serve applications that deploy.yaml names, built from their `args`."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from actors.coordinator.coordinator import Coordinator
from actors.names import BASE_MODEL, COORDINATOR, GATEWAY, GUIDE
from actors.replica.base import BaseModel
from actors.replica.guide import Guide
from actors.replica.router import LeaseRouter
from actors.settings import BaseModelSettings, CoordinatorSettings, GuideSettings, Health
from deploy.http.gateway import Gateway

# A coordinator and a gateway hold no model: a small share of a core lets Ray place them anywhere.
LIGHT = {"num_cpus": 0.1}
# These batch by themselves; what may run at once is bounded where the models are.
UNBOUNDED = 100_000
# GNU's OpenMP, torch's on Linux: its threads wait actively for what the next operation needs within a tenth of a
# millisecond or so, and leave the cores to another model after that.
THREADS = {"GOMP_SPINCOUNT": "20000"}
# How often Serve looks whether a replica that is to end has nothing more to do.
DRAIN_LOOK_S = 0.5


def base(args: BaseModelSettings) -> Application:
    """`trimtab-base`: the frozen base model."""
    return serve.deployment(BaseModel, name=BASE_MODEL, **model_options(args)).bind(args)


def guide(args: GuideSettings) -> Application:
    """`trimtab-guide-<name>`: one autoregressive reward model."""
    return serve.deployment(Guide, name=GUIDE, **model_options(args)).bind(args)


def trimtab(args: CoordinatorSettings) -> Application:
    """`trimtab`: HTTP, and the loop that steers."""
    light = {
        "max_ongoing_requests": UNBOUNDED,
        "ray_actor_options": LIGHT,
        **life_options(args.health, args.limits.drain_s),
    }
    coordinator = serve.deployment(Coordinator, name=COORDINATOR, **light).bind(args)
    return serve.deployment(Gateway, name=GATEWAY, **light).bind(coordinator, args)


def model_options(args: BaseModelSettings) -> dict[str, Any]:
    """How Serve runs a deployment that holds a model."""
    resources = args.resources
    environment = dict(THREADS)
    if args.tensor_parallel > 1 and not resources.gpus:
        # transformers would put slices on a GPU that it sees, and Ray hides none from those that take none.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    actor: dict[str, Any] = {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "resources": resources.custom,
        "runtime_env": {"env_vars": environment},
    }
    if resources.accelerator_type is not None:
        actor["accelerator_type"] = resources.accelerator_type
    options: dict[str, Any] = {
        # A lease lasts as long as its sequence: Serve lets in as many as the engine has room for.
        "max_ongoing_requests": args.max_sequences,
        "ray_actor_options": actor,
        "request_router_config": RequestRouterConfig(request_router_class=LeaseRouter),
        # A lease's line in the access log would tell nothing that its request's does not.
        "logging_config": {"enable_access_log": False},
        **life_options(args.health, args.drain_s),
    }
    if args.tensor_parallel > 1:
        rank = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
        if resources.accelerator_type is not None:
            # What Ray makes of an actor's accelerator_type.
            rank[f"accelerator_type:{resources.accelerator_type}"] = 0.001
        bundle = {name: amount for name, amount in rank.items() if amount}
        # On one node if there is room: ranks exchange something in every layer.
        options["placement_group_bundles"] = [bundle] * args.tensor_parallel
        options["placement_group_strategy"] = "PACK"
        if resources.labels:
            options["placement_group_bundle_label_selector"] = [resources.labels] * args.tensor_parallel
    elif resources.labels:
        actor["label_selector"] = resources.labels
    return options


def life_options(health: Health, drain_s: float) -> dict[str, Any]:
    """How Serve watches over replicas, and how it ends them."""
    return {
        "health_check_period_s": health.period_s,
        "health_check_timeout_s": health.timeout_s,
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
    }
