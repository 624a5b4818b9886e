"""Rewards that rank answers: those that ship, and how one of a user's own is found by name.

`sentence_positivity` and `sentence_plainness` are means over an answer's distinct sentences, which no repetition can
win, at any length. `positivity` and `plainness` score the text as a whole: they are for answers of a sentence or two,
and what was published with them.

A reward is a function of a prompt, as it was given, and a response's text; higher is better. Knows nothing of files.
"""

import functools
import importlib
import itertools
import math
import re
import statistics
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.training.repetition import words
from cluster.errors import InvalidConfiguration, TrimtabError

Reward = Callable[[str | list[dict[str, str]], str], float]

EXAMPLE = "actors.training.rewards:sentence_positivity"

ARI_SPAN = 20.0
"""Readability indices from 0, for a beginner, to this one, for nobody, are told apart."""


def positivity(prompt: str | list[dict[str, str]], response: str) -> float:
    """VADER's compound sentiment of the response, between -1 and 1 (Hutto and Gilbert, 2014).

    Raises:
        InvalidConfiguration: the package vaderSentiment is not installed.
    """
    return float(_analyzer().polarity_scores(response)["compound"])


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise InvalidConfiguration(
            "positivity needs the package vaderSentiment: pip install vaderSentiment (or trimtab[train])"
        ) from error
    return SentimentIntensityAnalyzer()


def plainness(prompt: str | list[dict[str, str]], response: str) -> float:
    """How easily the response reads: 1 - clip(ARI, 0, 20) / 10, between -1 and 1; -1 if it has no word.

    ARI = 4.71 * letters and digits per word + 0.5 * words per sentence - 21.43 is the Automated Readability Index
    (Senter and Smith, 1967). A sentence ends at a full stop, an exclamation or question mark, or a line break.
    """
    spoken = [word for word in response.split() if any(map(str.isalnum, word))]
    if not spoken:
        return -1.0
    num_characters = sum(map(str.isalnum, response))
    sentences = [part for part in re.split(r"[.!?\r\n]", response) if any(map(str.isalnum, part))]
    index = 4.71 * num_characters / len(spoken) + 0.5 * len(spoken) / len(sentences) - 21.43
    return 1 - min(max(index, 0.0), ARI_SPAN) / (ARI_SPAN / 2)


def sentence_positivity(prompt: str | list[dict[str, str]], response: str) -> float:
    """The mean of VADER's compound sentiment over the response's distinct sentences, between -1 and 1; 0 without any.

    Within a sentence every word counts once, at its first place, so that 'happy and happy and happy' is as positive as
    'happy and'.

    Raises:
        InvalidConfiguration: the package vaderSentiment is not installed.
    """
    scores = [positivity(prompt, _without_repeats(sentence)) for sentence in distinct_sentences(response)]
    return statistics.fmean(scores) if scores else 0.0


def sentence_plainness(prompt: str | list[dict[str, str]], response: str) -> float:
    """How easily the response's distinct sentences read: 1 - clip(ARI, 0, 20) / 10; -1 if there is none.

    ARI is the mean over the sentences of 4.71 * letters and digits per word + 0.5 * words - 21.43 (Senter and Smith,
    1967), so that a short sentence that returns counts once.
    """
    indices = []
    for sentence in distinct_sentences(response):
        spoken = [word for word in sentence.split() if any(map(str.isalnum, word))]
        num_characters = sum(map(str.isalnum, sentence))
        indices.append(4.71 * num_characters / len(spoken) + 0.5 * len(spoken) - 21.43)
    if not indices:
        return -1.0
    return 1 - min(max(statistics.fmean(indices), 0.0), ARI_SPAN) / (ARI_SPAN / 2)


def freshness(prompt: str | list[dict[str, str]], response: str) -> float:
    """The share of the response's pairs of adjacent words that are new: in neither the prompt nor what came before."""
    text = prompt if isinstance(prompt, str) else " ".join(turn["content"] for turn in prompt)
    seen = set(itertools.pairwise(words(text)))
    pairs = list(itertools.pairwise(words(response)))
    num_new = 0
    for pair in pairs:
        num_new += pair not in seen
        seen.add(pair)
    return num_new / max(1, len(pairs))


def fresh_positivity(prompt: str | list[dict[str, str]], response: str) -> float:
    """`sentence_positivity` and `freshness`: for a sentence that goes on from a text, which is to be no echo.

    Raises:
        InvalidConfiguration: the package vaderSentiment is not installed.
    """
    return sentence_positivity(prompt, response) + freshness(prompt, response)


def fresh_plainness(prompt: str | list[dict[str, str]], response: str) -> float:
    """`sentence_plainness` and `freshness`: short sentences invite echoes."""
    return sentence_plainness(prompt, response) + freshness(prompt, response)


def distinct_sentences(text: str) -> list[str]:
    """Return the sentences that have a word, each once, however its case and punctuation differ.

    A sentence ends at a full stop, an exclamation or question mark before a space, or at a line break.
    """
    found: dict[tuple[str, ...], str] = {}
    for sentence in re.split(r"(?<=[.!?])\s+|[\r\n]+", text):
        if any(map(str.isalnum, sentence)):
            found.setdefault(tuple(words(sentence)), sentence)
    return list(found.values())


def _without_repeats(sentence: str) -> str:
    """The sentence with every word at its first place alone."""
    first: dict[str, str] = {}
    for word in sentence.split():
        first.setdefault(word.lower().strip(string.punctuation), word)
    return " ".join(first.values())


def load_reward(name: str) -> Reward:
    """Return the function that `package.module:function` names; the current directory is searched last.

    Raises:
        InvalidConfiguration: the name has another form, its module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InvalidConfiguration(f"reward {name!r} is not of the form module:function, such as {EXAMPLE}")
    here = str(Path.cwd())
    if here not in sys.path:
        # To stay: the reward may import more of the user's modules when it is called.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidConfiguration(
                f"reward {name!r}: there is no module {error.name!r} in {here} nor among the installed packages"
            ) from error
        raise InvalidConfiguration(
            f"reward {name!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "is no function" if hasattr(module, function_name) else "does not exist"
        raise InvalidConfiguration(f"reward {name!r}: {function_name} {what} in {module.__file__}")
    reward: Reward = function
    return reward


def score(reward: Reward, prompt: str | list[dict[str, str]], responses: Sequence[str], *, number: int) -> list[float]:
    """Return the rewards of the responses to prompt `number`.

    Raises:
        InvalidConfiguration: the reward failed, or returned what is no finite number.
    """
    rewards = []
    for position, response in enumerate(responses, 1):
        where = f"the reward of answer {position} to prompt {number}"
        try:
            value = float(reward(prompt, response))
        except TrimtabError:
            raise
        except Exception as error:
            raise InvalidConfiguration(
                f"{where} raised {type(error).__name__}: {error}; mend the reward, the answers are kept"
            ) from error
        if not math.isfinite(value):
            raise InvalidConfiguration(f"{where} is {value}; a reward must be a finite number")
        rewards.append(value)
    return rewards
