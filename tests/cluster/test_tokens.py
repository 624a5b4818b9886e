"""The service writes the reference's tokens, over every transport, alone and in a batch."""

import asyncio
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.api import Piece
from actors.guidance import Sampling
from actors.guidance.reference import ReferenceText, Voice, generate
from deploy.client import AsyncClient
from tests import tiny
from tests.cluster.conftest import Deploy, model_args, service_config
from tests.reference import Comparison

MAX_TOKENS = 24
PROMPTS = [("the quick brown fox jumps over the lazy dog. " * 3)[i : i + 1 + 4 * i] for i in range(24)]
"""Of 1 to 93 characters, and so tokens."""

GUIDANCE: list[dict[str, float]] = [
    {},
    {"kind": 1.0},
    {"kind": 0.6, "terse": 1.7},
    {"terse": -0.8},
    {"kind": -0.5, "terse": 0.5, "wide": 1.0},
    {"narrow": 0.9},
    {"kind": 0.0},
]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 12},
    {"top_p": 0.7},
    {"temperature": 1.8, "min_p": 0.05, "top_k": 40, "top_p": 0.95},
]
BASE = tiny.llama(80)
GUIDES = {
    "kind": tiny.qwen3(80, seed=1),
    "terse": tiny.gpt2(80, seed=2),
    "wide": tiny.gemma2(97, seed=3),
    "narrow": tiny.llama(60, seed=4),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny base with guides of its own and of other vocabulary sizes, on disk."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save(model, root / name) for name, model in {"base": BASE, **GUIDES}.items()}


@pytest.fixture(scope="module", params=["shared_memory", "grpc"], autouse=True)
def service(request: pytest.FixtureRequest, deploy: Deploy, directories: dict[str, str]) -> None:
    # Prompts in chunks, and one guide with room for few sequences: some are preempted.
    chunks = {"max_prompt_tokens_per_step": 16}
    guides = {name: model_args(directories[name], base=directories["base"], **chunks) for name in GUIDES}
    guides["kind"]["cache_tokens"] = guides["kind"]["max_context"]
    # Some send hidden states, one of them other logits than a plain product's.
    guides["terse"]["rows"] = guides["wide"]["rows"] = "hidden_states"
    base = model_args(directories["base"], **chunks)
    deploy(service_config(base, guides, exchange={"transport": request.param}))


def tokens_of(model: PreTrainedModel, prompt: str) -> list[int]:
    fast: PreTrainedTokenizerFast = tiny.tokenizer(model.config.vocab_size)
    return list(fast(prompt).input_ids)


def reference(prompt: str, weights: dict[str, float], **settings: Any) -> ReferenceText:
    voices = [
        Voice(model=GUIDES[name], prompt=tokens_of(GUIDES[name], prompt), weight=weight)
        for name, weight in sorted(weights.items())
    ]
    return generate(
        Voice(model=BASE, prompt=tokens_of(BASE, prompt)),
        voices,
        sampling=Sampling(**settings),
        max_tokens=MAX_TOKENS,
        end_tokens={0},
    )


async def answer_all(requests: list[dict[str, Any]]) -> list[Piece]:
    client = AsyncClient()
    return await asyncio.gather(*(client.generate(max_tokens=MAX_TOKENS, **request) for request in requests))


async def test_greedy_tokens_are_the_references_for_many_prompts_at_once() -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "weights": GUIDANCE[i % len(GUIDANCE)], "temperature": 0} for i, prompt in enumerate(PROMPTS)
    ]
    comparison = Comparison()
    for request, answer in zip(requests, await answer_all(requests), strict=True):
        expected = reference(request["prompt"], request["weights"], temperature=0)
        comparison.add(request, answer["token_ids"], expected)
    comparison.finish()


async def test_sampled_tokens_are_the_references_alone_and_among_sixteen() -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPTS[i], "weights": GUIDANCE[i % len(GUIDANCE)], "seed": 1000 + i, **SAMPLINGS[i % 4]}
        for i in range(16)
    ]
    together = await answer_all(requests)
    comparison = Comparison()
    for i, request in enumerate(requests):
        settings = {key: value for key, value in request.items() if key not in ("prompt", "weights")}
        expected = reference(request["prompt"], request["weights"], **settings)
        comparison.add(request, together[i]["token_ids"], expected)
        if i < 4:
            alone = await answer_all([request])
            comparison.add(request, alone[0]["token_ids"], expected)
    comparison.finish()


async def test_a_request_that_arrives_while_others_run_changes_none_of_them() -> None:
    client = AsyncClient()
    long = {"prompt": "a long one", "weights": {"kind": 1.0}, "seed": 5}
    undisturbed = await client.generate(max_tokens=100, **long)
    running = client.stream(max_tokens=100, **long)
    tokens = list((await anext(running))["token_ids"])
    others = await answer_all([{"prompt": "x", "weights": {"terse": 1.0}}, {"prompt": "y" * 90}])
    tokens += [token async for piece in running for token in piece["token_ids"]]
    assert tokens == undisturbed["token_ids"]
    assert all(other["finish_reason"] for other in others)


async def test_weight_zero_is_the_base() -> None:
    with_zero, base = await answer_all(
        [{"prompt": "hello", "weights": {"kind": 0.0}, "seed": 3}, {"prompt": "hello", "seed": 3}]
    )
    assert with_zero["token_ids"] == base["token_ids"]


async def test_a_guide_with_fewer_tokens_forbids_those_it_lacks() -> None:
    answers = await answer_all(
        [{"prompt": "hello", "weights": {"narrow": 0.01}, "seed": i, "temperature": 3.0} for i in range(8)]
    )
    free = await answer_all([{"prompt": "hello", "seed": i, "temperature": 3.0} for i in range(8)])
    assert max(token for answer in answers for token in answer["token_ids"]) < 60
    assert max(token for answer in free for token in answer["token_ids"]) >= 60
