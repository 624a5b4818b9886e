"""Templates and prompts that fail in every way that Python knows, while healthy answers are written."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.prompts import PromptEncoder
from actors.settings import CHECKOUT
from cluster.errors import InvalidRequest
from tests import tiny
from tests.local_serve import LocalServe, local_coordinator
from tests.reference import Comparison
from tests.unit.actors.coordinator.test_survival import BASE, KIND, NUM_TOKENS, Reader, expected, only, until

EXPRESSIONS = [
    "none + 's'",
    "'s' + 1",
    "1 // 0",
    "1 % 0",
    "1 / 0.0",
    "messages[5].content",
    "messages[0].nothing.more",
    "messages.nothing()",
    "nothing()",
    "nothing.more",
    "'x'.nothing()",
    "'x'()",
    "1()",
    "[][0].more",
    "{}['a'].more",
    "'a'.index('b')",
    "[].index(1)",
    "'{}'.format()",
    "'%d' % 'x'",
    "'%s %s' % 'x'",
    "range(10 ** 9) | list",
    "10 ** 400 * 1.5",
    "'x' * 10 ** 18",
    "''.__class__.__mro__",
    "messages.__class__.__init__.__globals__",
    "messages | sum",
    "[messages, 1] | sort",
    "messages | nothing",
    "messages is nothing",
    "[1, 'a'] | sort",
    "[1, none] | max",
    "1 | join",
    "1 | first",
    "none | list",
    "'abc' | round",
    "'a' < 1",
    "[1] + 'a'",
    "{'a': 1} + {}",
    "{[]: 1}",
    "{}.fromkeys(1)",
    "'a'.encode('nothing')",
    "'\\ud83d' | tojson | length // 0",
    "strftime_now(1)",
    "raise_exception('no')",
    "raise_exception()",
    "messages[0]['content'].strip(1)",
    "'x'.join([1])",
    "namespace(1, 2, 3)",
]
STATEMENTS = [
    "{% for m in 1 %}{% endfor %}",
    "{% for a, b in messages %}{{ a }}{{ b.more.still }}{% endfor %}",
    "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}",
    "{% include 'nothing' %}",
    "{% extends 'nothing' %}",
    "{% import 'nothing' as n %}",
    "{% if %}",
    "{{",
    "{% endfor %}",
    "{% nothing %}",
    "{% set messages.more = 1 %}",
    "{% call nothing() %}{% endcall %}",
]
TEMPLATES = [*(f"{{{{ {expression} }}}}" for expression in EXPRESSIONS), *STATEMENTS]
FIELDS: dict[str, Any] = {"prompt": "hello", "weights": {"kind": 1.0}, "max_tokens": NUM_TOKENS}


@pytest.fixture
async def serve() -> AsyncIterator[LocalServe]:
    serve = LocalServe()
    await serve.start("base", BASE, room=10)
    await serve.start("kind", KIND, room=10)
    yield serve
    await serve.stop()


async def test_fifty_failing_templates_are_refused_at_once_while_eight_streams_go_on(
    serve: LocalServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = only(serve, "base")
    healthy = base._encoder
    failing = [PromptEncoder(tiny.tokenizer(80), template) for template in TEMPLATES]
    told = {}
    async with local_coordinator(monkeypatch, serve, ["kind"]) as coordinator:
        readers = [Reader(coordinator, seed=seed, **FIELDS) for seed in range(8)]
        for reader in readers:
            await reader.begun()
        for number, (template, encoder) in enumerate(zip(TEMPLATES, failing, strict=True), 1):
            monkeypatch.setattr(base, "_encoder", encoder)
            with pytest.raises(InvalidRequest) as caught:
                await coordinator.generate(messages=[{"role": "user", "content": "hi"}], timeout=30)
            # Asked once, and never again.
            assert serve.num_leases["base"] == 8 + number
            told[template] = caught.value.message
        monkeypatch.setattr(base, "_encoder", healthy)
        comparison = Comparison()
        for seed, reader in enumerate(readers):
            comparison.add(seed, await reader.tokens(), expected(seed, {"kind": 1.0}))
        comparison.finish()
        await until(lambda: not any(serve.load(only(serve, name)) for name in ("base", "kind")))
    assert len(told) >= 50
    for message in told.values():
        assert message.startswith("messages: ")
        assert len(message) < 500
        assert not any(word in message for word in ("Traceback", "site-packages", "pid=", str(CHECKOUT), "0x"))
