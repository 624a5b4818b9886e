"""A deploy.yaml as arithmetic sees it: its models with what their deployments give them, and the ways between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from actors.engine import RowKind
from actors.names import BASE, COORDINATOR, TRIMTAB, guide_application
from actors.settings import DEFAULT_CACHE_TOKENS, NO_GUIDANCE, BaseModelSettings, CoordinatorSettings, GuideSettings
from cluster.errors import InvalidConfiguration
from deploy.planning.hardware import LOOPBACK, SHARED_MEMORY, Accelerator, CoordinatorCosts, Link
from deploy.planning.models import Shape, read_shape

ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The base or a guide."""

    name: str
    """`base`, or the guide's."""

    shape: Shape
    dtype: str
    rows: RowKind
    accelerator: Accelerator
    """Of which each replica has `tensor_parallel`."""

    tensor_parallel: int = 1
    replicas: int = 1
    max_sequences: int
    max_context: int
    cache_tokens: int
    link: Link
    """To a coordinator."""

    node: str
    """Equal for models that share a machine's processors."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Of what it sends for one token."""
        width = self.shape.vocabulary if self.rows == "logits" else self.shape.hidden
        return width * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The whole service."""

    base: Model
    guides: tuple[Model, ...]
    coordinators: int = 1
    costs: CoordinatorCosts = field(default_factory=CoordinatorCosts)

    @property
    def models(self) -> tuple[Model, ...]:
        """All of them, the base first."""
        return (self.base, *self.guides)


Choose = Callable[[str, BaseModelSettings], Accelerator]
"""Returns an application's accelerator."""


def read_service(
    schema: ServeDeploySchema,
    settings: Mapping[str, BaseModel],
    *,
    choose: Choose,
    guides: Sequence[str],
    far: Link,
    is_apart: bool,
) -> Service:
    """Return the service of a checked deploy.yaml.

    Args:
        schema: the file as Serve reads it.
        settings: the args of its applications, by name.
        choose: gives every application its accelerator.
        guides: those that every sequence uses.
        far: the link of a guide that is on another machine than its coordinator.
        is_apart: whether guides are, whatever their resources say.

    Raises:
        InvalidConfiguration: a model cannot be planned with.
    """
    applications = {application.name: application for application in schema.applications}
    own = settings[TRIMTAB]
    base = settings[BASE]
    assert isinstance(own, CoordinatorSettings)
    assert isinstance(base, BaseModelSettings)
    near = LOOPBACK if own.exchange.transport == "grpc" else SHARED_MEMORY

    def model(name: str, application: str) -> Model:
        args = settings[application]
        assert isinstance(args, BaseModelSettings)
        is_far = name != NO_GUIDANCE and (is_apart or _node(args) != _node(base))
        shape = read_shape(args.model, max_context=args.max_context)
        _check_sharding(application, args, shape)
        return Model(
            name=name,
            shape=shape,
            dtype=args.dtype,
            rows=args.rows if isinstance(args, GuideSettings) else "logits",
            accelerator=choose(application, args),
            tensor_parallel=args.tensor_parallel,
            replicas=num_replicas(applications[application]),
            max_sequences=args.max_sequences,
            max_context=args.max_context,
            cache_tokens=args.cache_tokens or max(DEFAULT_CACHE_TOKENS, args.max_context),
            link=far if is_far else near,
            node=name if is_far else NO_GUIDANCE,
        )

    return Service(
        base=model(NO_GUIDANCE, BASE),
        guides=tuple(model(name, guide_application(name)) for name in guides),
        coordinators=num_replicas(applications[TRIMTAB], COORDINATOR),
    )


def num_replicas(application: ServeApplicationSchema, deployment: str | None = None) -> int:
    """Return how many replicas a deployment has, or may grow to."""
    for options in application.deployments:
        if deployment is None or options.name == deployment:
            given = options.model_dump(exclude_unset=True)
            scaling = given.get("autoscaling_config")
            if isinstance(scaling, dict):
                return int(scaling.get("max_replicas", 1))
            if isinstance(given.get("num_replicas"), int):
                return int(given["num_replicas"])
    return 1


def _node(args: BaseModelSettings) -> tuple[object, ...]:
    """What binds a model to a kind of nodes; equal for models that may share one."""
    resources = args.resources
    return resources.accelerator_type, tuple(sorted(resources.custom)), tuple(sorted(resources.labels.items()))


def _check_sharding(application: str, args: BaseModelSettings, shape: Shape) -> None:
    if args.tensor_parallel == 1:
        return
    if not shape.can_be_sharded:
        raise InvalidConfiguration(f"{application}: transformers has no plan for sharding {args.model!r} out")
    if shape.cache_heads % args.tensor_parallel:
        raise InvalidConfiguration(
            f"{application}: tensor_parallel is {args.tensor_parallel}, which does not divide the {shape.cache_heads} "
            f"key-value heads of {args.model!r}"
        )
