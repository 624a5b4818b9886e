"""Makes prompts that end inside answers: `trimtab contexts --answers FILE --model DIR --output FILE`.

Where a reward is one of sentences, the sentences that may come next after the same beginning are the pairs that teach
the most (`trimtab prefer --sentence`). A beginning is the prompt as the model's template writes it, and the first
sentences of one of its answers, or none of them; of an answer that is stuck, those up to where it has become so.
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actors.prompts import Prompt, PromptEncoder
from actors.training.repetition import longest_repeat
from actors.vocabularies import load_tokenizer
from cluster.errors import InvalidConfiguration
from deploy.cli.options.contexts import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.prefer.answers import AnswersLine

SENTENCE_END = re.compile(r"[.!?](?=\s)|\n+")
MIN_CHARACTERS = 30
MAX_REPEAT = 12
"""Longest repeated run, in words, of a text that is not stuck."""


def beginnings(text: str, max_characters: int) -> list[str]:
    """Return the text up to the end of each of its sentences, within the limits.

    Of a text that is stuck only the place where it has become so, within twice the limit: there a guide can learn what
    leads out again.
    """
    begun = [text[: match.end()] for match in SENTENCE_END.finditer(text)]
    if longest_repeat(text) > MAX_REPEAT:
        return [first for first in begun if longest_repeat(first) > MAX_REPEAT and len(first) <= 2 * max_characters][:1]
    return [beginning for beginning in begun if MIN_CHARACTERS <= len(beginning) <= max_characters]


def contexts(
    line: AnswersLine, encoder: PromptEncoder, tokenizer: Any, *, num: int, max_characters: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield a prompt, and after it `num` of the places inside its answers that it may go on from, an answer each.

    Raises:
        InvalidRequest: the prompt cannot be encoded.
    """
    content = line.content()
    text = tokenizer.decode(encoder.encode(Prompt(content.get("prompt"), content.get("messages"))))
    yield {"id": f"{line.id}", "prompt": text}
    for number, answer in enumerate(rng.sample(line.answers, min(num, len(line.answers))), 1):
        if found := beginnings(answer.text, max_characters):
            yield {"id": f"{line.id}-{number}", "prompt": text + rng.choice(found)}


def read_answers(path: Path) -> Iterator[AnswersLine]:
    """Yield the lines of a file of answers.

    Raises:
        InvalidConfiguration: one of them is something else.
        OSError: it cannot be read.
    """
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            yield AnswersLine.model_validate_json(raw)
        except ValueError as error:
            raise InvalidConfiguration(
                f"{path}, line {number}: no answers as trimtab prefer keeps them ({error})"
            ) from error


def run(options: Options) -> None:
    """Write the prompts, and say how many there are.

    Raises:
        TrimtabError: the answers or the model's tokenizer cannot be used.
        OSError: a file cannot be read or written.
    """
    try:
        tokenizer = load_tokenizer(str(options.model))
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"--model: {error}") from error
    encoder, rng = PromptEncoder(tokenizer), random.Random(options.seed)
    made = [
        context
        for line in read_answers(options.answers)
        for context in contexts(
            line, encoder, tokenizer, num=options.inside, max_characters=options.max_characters, rng=rng
        )
    ]
    options.output.write_text("".join(json.dumps(context) + "\n" for context in made))
    print(f"{len(made)} prompts are in {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 if nothing was written."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("contexts"))
