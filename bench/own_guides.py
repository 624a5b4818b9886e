"""What a reader's own guide does: three manners of writing, each a set of 300 pairs made out of a base's answers.

    python -m bench.own_guides --answers FILE --output DIR

The answers are those that trimtab prefer keeps. Each chosen response is an answer that was changed, and the rejected
one the answer itself; in the fourth set a coin chooses between two answers, which no guide can learn. The functions are
rewards for trimtab evaluate (`bench/own_guides.yaml`), which counts what became of it.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from actors.training.repetition import longest_repeat, words
from deploy.cli.contexts import MAX_REPEAT, SENTENCE_END, read_answers
from deploy.jobs.prefer.answers import AnswersLine

Prompt = str | list[dict[str, str]]

NUM_PAIRS = 300
MAX_CHARACTERS = 900

QUESTIONS = (
    "What do you think?",
    "Would you like to hear more about it?",
    "Which part of it matters most to you?",
    "Is there anything else that you would like to know?",
    "Have you ever seen it yourself?",
    "What would you do in such a case?",
    "Shall I go into the details?",
    "How do you see it?",
    "Does that answer your question?",
    "What else can I do for you?",
)

PIRATE = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "friend": "matey",
    "friends": "mateys",
    "people": "landlubbers",
    "person": "landlubber",
    "money": "doubloons",
    "yes": "aye",
    "hello": "ahoy",
    "never": "ne'er",
    "over": "o'er",
    "for": "fer",
    "to": "t'",
}
PIRATE_WORDS = frozenset(PIRATE.values()) - {"be", "me"} | {"arr", "ahoy", "matey", "avast", "aye"}
"""Those that nobody else says."""


def ends_in_question(prompt: Prompt, response: str) -> float:
    """1 if the response's last sentence is a question, otherwise 0."""
    return float(response.rstrip().rstrip("\"')").endswith("?"))


def pirate_share(prompt: Prompt, response: str) -> float:
    """The share of the response's words that pirates say."""
    spoken = re.findall(r"[\w']+", response.lower())
    return sum(word in PIRATE_WORDS for word in spoken) / max(1, len(spoken))


def num_words(prompt: Prompt, response: str) -> float:
    """How many words the response has."""
    return float(len(words(response)))


def ask(answer: str, rng: random.Random) -> str:
    """Return the answer with a question behind it."""
    return f"{answer} {rng.choice(QUESTIONS)}"


def speak_like_a_pirate(answer: str, rng: random.Random) -> str:
    """Return the answer in other words."""

    def replace(match: re.Match[str]) -> str:
        word = match.group()
        other = PIRATE.get(word.lower(), word)
        return other.capitalize() if word[0].isupper() else other

    return f"{rng.choice(('Arr!', 'Ahoy, matey!', 'Avast!', 'Aye, matey!'))} {re.sub(r'[A-Za-z]+', replace, answer)}"


def shorten(answer: str, rng: random.Random) -> str:
    """Return the answer's first sentence."""
    end = SENTENCE_END.search(answer)
    return answer[: end.end()].rstrip() if end else answer


MANNERS: dict[str, Callable[[str, random.Random], str]] = {
    "question": ask,
    "pirate": speak_like_a_pirate,
    "short": shorten,
}


def finished(line: AnswersLine) -> list[str]:
    """Return the answers that ended by themselves, are no echo, and are no question already."""
    return [
        text
        for answer in line.answers
        if answer.finish_reason == "stop"
        and 0 < len(text := answer.text.strip()) <= MAX_CHARACTERS
        and longest_repeat(text) <= MAX_REPEAT
        and not ends_in_question("", text)
    ]


def pairs(name: str, lines: list[AnswersLine]) -> Iterator[dict[str, object]]:
    """Yield the pairs of one set; `random` is that of the coin."""
    rng = random.Random(name)
    for line in lines:
        if name == "random":
            chosen, rejected = rng.sample([answer.text[:MAX_CHARACTERS] for answer in line.answers], 2)
            yield {**line.content(), "chosen": chosen, "rejected": rejected}
            continue
        for answer in finished(line):
            if (chosen := MANNERS[name](answer, rng)) != answer:
                yield {**line.content(), "chosen": chosen, "rejected": answer}


def main() -> None:
    """Write the four sets."""
    parser = argparse.ArgumentParser(prog="python -m bench.own_guides", description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="that trimtab prefer keeps")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a file a set")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lines = list(read_answers(options.answers))
    for name in (*MANNERS, "random"):
        made = list(pairs(name, lines))
        chosen = random.Random(0).sample(made, min(NUM_PAIRS, len(made)))
        (options.output / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in chosen))
        print(f"{len(chosen)} pairs are in {options.output / name}.jsonl")


if __name__ == "__main__":
    main()
