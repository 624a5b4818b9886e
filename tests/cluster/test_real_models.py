"""The shipped models: the service writes the reference's tokens for real prompts, all at once."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.engine import Engine, Work
from actors.guidance import Sampling
from actors.guidance.reference import ReferenceText, Voice, generate
from actors.prompts import Prompt, PromptEncoder
from actors.settings import CHECKOUT
from deploy.client import AsyncClient
from tests.cluster.conftest import Deploy, model_args, service_config
from tests.reference import Comparison

BASE = CHECKOUT / "models" / "smollm2-135m-instruct"
POSITIVITY = CHECKOUT / "models" / "positivity"
HELD_OUT = CHECKOUT / "deploy" / "guides" / "heldout_prompts.jsonl"
NUM_PROMPTS = 20
MAX_TOKENS = 8
TEMPLATE = "Answer in one short sentence.\n\n{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
GUIDANCE: dict[str, dict[str, float]] = {
    "none": {},
    "one": {"positivity": 1.0},
    "negative": {"positivity": -0.5},
}
TWO: list[dict[str, float]] = [{"positivity": 0.5, "short": 0.7}, {"positivity": 1.5, "short": -0.3}]


@pytest.fixture(scope="module", autouse=True)
def service(deploy: Deploy) -> None:
    """The base, its guide, and the base again as a guide that is prompted to be short."""
    room: dict[str, Any] = {"max_context": 512, "max_sequences": 32, "threads": 2}
    guides = {
        "positivity": model_args(str(POSITIVITY), base=str(BASE), **room),
        "short": model_args(str(BASE), base=str(BASE), prompt_template=TEMPLATE, **room),
    }
    deploy(service_config(model_args(str(BASE), **room), guides))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    base = AutoModelForCausalLM.from_pretrained(BASE)
    return {"base": base, "short": base, "positivity": AutoModelForCausalLM.from_pretrained(POSITIVITY)}


def conversations() -> list[list[dict[str, str]]]:
    """Real prompts, some of them longer than a step takes at once."""
    prompts = [json.loads(line)["messages"] for line in Path(HELD_OUT).read_text().splitlines()[:NUM_PROMPTS]]
    for number in range(0, NUM_PROMPTS, 7):
        prompts[number][0]["content"] += " Think of what came before it." * (4 * number + 10)
    return prompts


def reference(models: dict[str, Any], messages: Any, weights: dict[str, float], **settings: Any) -> ReferenceText:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    voices = [
        Voice(
            model=models[name],
            prompt=PromptEncoder(tokenizer, TEMPLATE if name == "short" else None).encode(Prompt(messages=messages)),
            weight=weights.get(name, 1.0),
        )
        for name in ("base", *sorted(weights))
    ]
    return generate(
        voices[0],
        voices[1:],
        sampling=Sampling(**settings),
        max_tokens=MAX_TOKENS,
        end_tokens={tokenizer.eos_token_id},
    )


@pytest.mark.parametrize("guidance", [*GUIDANCE, "two"])
async def test_greedy_tokens_are_the_references(models: dict[str, Any], guidance: str) -> None:
    prompts = conversations()
    weights = [GUIDANCE.get(guidance, TWO[number % 2]) for number in range(len(prompts))]
    client = AsyncClient()
    answers = await asyncio.gather(
        *(
            client.generate(messages=messages, weights=chosen, temperature=0.0, max_tokens=MAX_TOKENS)
            for messages, chosen in zip(prompts, weights, strict=True)
        )
    )
    comparison = Comparison()
    for messages, chosen, answer in zip(prompts, weights, answers, strict=True):
        expected = reference(models, messages, chosen, temperature=0.0)
        comparison.add(messages[0]["content"][:40], answer["token_ids"], expected)
    comparison.finish()


@pytest.mark.parametrize("model", [BASE, POSITIVITY])
def test_the_models_run_in_bfloat16(model: Path) -> None:
    """The engine verifies itself when it starts; this is near the model's own logits in float32."""
    engine = Engine.load(str(model), dtype=torch.bfloat16, max_sequences=1, max_context=64)
    tokens = AutoTokenizer.from_pretrained(BASE)("The weather in the mountains was").input_ids
    engine.open("a")
    [found] = engine.step([Work("a", tokens, [len(tokens) - 1])]).float().softmax(-1)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([tokens])).logits[0, -1].softmax(-1)
    assert (found - expected).abs().sum() < 0.2
