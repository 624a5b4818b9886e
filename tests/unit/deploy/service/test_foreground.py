"""The service in the foreground: how long its end may take."""

from typing import Any

import pytest

from deploy.service.foreground import drain_s_of


@pytest.mark.parametrize(
    ("args", "drain_s"), [({"limits": {"drain_s": 3}}, 3), ({"limits": {}}, 60), ({}, 60), (None, 60)]
)
def test_answers_have_the_coordinators_time_to_end(args: Any, drain_s: float) -> None:
    models = {"name": "trimtab-base", "args": {"drain_s": 7}}
    assert drain_s_of({"applications": [models, {"name": "trimtab", "args": args}]}) == drain_s
    assert drain_s_of({"applications": [models]}) == 60
