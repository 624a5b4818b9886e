"""The oracle itself agrees with transformers' own generation and with the definition."""

import torch

from actors.guidance import Sampling
from actors.guidance.reference import Voice, generate
from tests import tiny

PROMPT = [5, 9, 30, 2]


def test_greedy_without_guides_is_transformers_own() -> None:
    model = tiny.llama()
    theirs = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)
    ours = generate(Voice(model=model, prompt=PROMPT), sampling=Sampling(temperature=0), max_tokens=20, end_tokens={0})
    assert ours.tokens == theirs[0, len(PROMPT) :].tolist()


def test_each_greedy_token_maximises_the_weighted_log_probabilities() -> None:
    base, one, two = tiny.llama(), tiny.gpt2(seed=1), tiny.gemma(seed=2)
    other_prompt = [7, 7]
    text = generate(
        Voice(model=base, prompt=PROMPT),
        [Voice(model=one, prompt=PROMPT, weight=0.8), Voice(model=two, prompt=other_prompt, weight=-0.6)],
        sampling=Sampling(temperature=0),
        max_tokens=10,
    )
    for i, token in enumerate(text.tokens):
        logs = [
            model(torch.tensor([[*prompt, *text.tokens[:i]]])).logits[0, -1].log_softmax(-1)
            for model, prompt in ((base, PROMPT), (one, PROMPT), (two, other_prompt))
        ]
        assert (logs[0] + 0.8 * logs[1] - 0.6 * logs[2]).argmax().item() == token


def test_weight_zero_is_no_guide() -> None:
    base, guide = (tiny.llama(seed=seed) for seed in (0, 1))
    sampling = Sampling(seed=8)
    alone = generate(Voice(model=base, prompt=PROMPT), sampling=sampling, max_tokens=15)
    zero = [Voice(model=guide, prompt=PROMPT, weight=0.0)]
    assert generate(Voice(model=base, prompt=PROMPT), zero, sampling=sampling, max_tokens=15) == alone


def test_it_ends_at_an_end_token() -> None:
    model = tiny.llama()
    free = generate(Voice(model=model, prompt=PROMPT), max_tokens=30)
    end = free.tokens[10]
    first = free.tokens.index(end)
    ended = generate(Voice(model=model, prompt=PROMPT), max_tokens=30, end_tokens={end})
    assert ended.tokens == free.tokens[: first + 1]
