"""docs/models.md is so: every family that it names is served exactly, or refused by name, and can do what is said."""

import re

import pytest

from actors.engine import Engine
from cluster.errors import InvalidConfiguration
from tests.families import FAMILIES, MAX_CONTEXT, PAGE, REFUSED, build, measure, recorded

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_can_do_what_the_page_says(family: str) -> None:
    assert measure(family) == recorded()[family]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_run_exactly_is_refused_by_name(family: str) -> None:
    model = build(family)
    with pytest.raises(InvalidConfiguration, match=re.escape(REFUSED[family])) as caught:
        Engine(model, max_sequences=2, max_context=MAX_CONTEXT)
    assert type(model).__name__ in str(caught.value)


def test_the_page_has_all_families_and_no_others() -> None:
    assert {*recorded()} == {*FAMILIES}
    assert all(f"| `{family}` | {reason} |" in PAGE.read_text() for family, reason in REFUSED.items())


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "youtu"])
def test_a_configuration_that_fits_no_forward_call_is_told(family: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"cannot compute logits of its own: RuntimeError: .*config\.json"):
        Engine(build(family, num_key_value_heads=2), max_sequences=2, max_context=MAX_CONTEXT)
