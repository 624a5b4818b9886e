"""Complaints about settings: by their path in the file, with applications and deployments by their names."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cluster.errors import InvalidConfiguration

Settings = TypeVar("Settings", bound=BaseModel)


def unknown_keys(path: str, model: type[BaseModel], value: object) -> Iterator[str]:
    """Yield a complaint for each key of parsed YAML that a schema does not have, whether or not it ignores them."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        where = f"{path}.{key}" if path else str(key)
        if key not in model.model_fields:
            yield _no_such_key(where, str(key), model.model_fields)
            continue
        for part in _models_in(model.model_fields[key].annotation):
            if isinstance(inner, list):
                for number, item in enumerate(inner):
                    yield from unknown_keys(_item_path(where, number, item), part, item)
            else:
                yield from unknown_keys(where, part, inner)


def _item_path(path: str, number: int, item: object) -> str:
    """The path of a list's item: an application by its name alone, a deployment by its name, others by number."""
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str):
        return f"{path}[{number}]"
    return name if path == "applications" else f"{path}[{name}]"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The groups of settings that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _no_such_key(path: str, key: str, known: Iterable[str]) -> str:
    return f"{path}: there is no such key{nearest(key, known)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question after the word that was meant; nothing if none is like it."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def validate(path: str, model: type[Settings], value: object) -> Settings:
    """Return a group of settings out of parsed YAML.

    Raises:
        InvalidConfiguration: each complaint with its path, which begins with `path`.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidConfiguration("\n".join(_complaints(path, model, value, error))) from error


def _complaints(path: str, model: type[BaseModel], value: object, error: ValidationError) -> Iterator[str]:
    for complaint in error.errors():
        where, item, known = path, value, [model]
        for part in complaint["loc"]:
            inner = item[part] if isinstance(item, list) and isinstance(part, int) and part < len(item) else None
            if isinstance(part, int):
                where = _item_path(where, part, inner)
            else:
                where = f"{where}.{part}" if where else str(part)
                inner = item.get(part) if isinstance(item, dict) else None
            if complaint["type"] == "extra_forbidden" and part == complaint["loc"][-1]:
                break
            item, known = inner, _models_at(known, part)
        if complaint["type"] == "extra_forbidden":
            yield _no_such_key(where, str(complaint["loc"][-1]), [key for each in known for key in each.model_fields])
        elif complaint["type"] == "missing":
            yield f"{where}: this key is missing"
        elif complaint["type"] == "value_error":
            yield f"{where}: {complaint['ctx']['error']}"
        else:
            yield f"{where}: {complaint['msg']}, not {complaint['input']!r}"


def _models_at(models: list[type[BaseModel]], part: int | str) -> list[type[BaseModel]]:
    """The groups of settings that a key of some leads to; the same ones, where it is a list's or a dictionary's."""
    inner = [model.model_fields[part].annotation for model in models if part in model.model_fields]
    return [model for annotation in inner for model in _models_in(annotation)] if inner else models
