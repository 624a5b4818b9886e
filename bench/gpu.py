"""The engine's decode step with random weights of real sizes, and the share of the memory's bandwidth that it reaches.

    python -m bench.gpu                                   an 8B base and a 1B guide on the GPU, bfloat16
    python -m bench.gpu --device cpu --base-size tiny --guide-size tiny --context 64 --sequences 1,4

Models are built on the device from a configuration; nothing is downloaded. A step decodes one token of every sequence
and brings the logits to the processor. It must read all weights once (of an input embedding of its own only the tokens'
rows) and every sequence's keys and values; the share is those bytes, divided by the step's time, of the bandwidth,
which is --bandwidth-gb-s or that of a large copy on the device, reads and writes counted.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from actors.engine import Engine, Work
from bench.machine import describe
from bench.options import RESULTS, plain, positive, positives
from bench.run import say, write
from bench.table import markdown

SIZES: dict[str, dict[str, Any]] = {
    # Llama 3.1 8B and Llama 3.2 1B.
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "tie_word_embeddings": True,
    },
}
BLOCK = 64
"""The room of each sequence is a multiple of it."""

MAX_STEP_TOKENS = 2048
"""Of prompts, in one step."""

WARM_UP_STEPS = 5
COPY_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One model with so many sequences."""

    model: str
    sequences: int
    step_ms: float
    read_bytes: int
    share: float
    """Of the bandwidth."""

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return 1e3 * self.sequences / self.step_ms


def build(size: str, arguments: argparse.Namespace, max_context: int) -> PreTrainedModel:
    """Return a Llama of that size with random weights, made on the device."""
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=max_context, bos_token_id=None, eos_token_id=0, rope_theta=500000.0
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    return model.eval()


def bytes_read(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of the weights that a decoding step must read, and of each cached token's keys and values."""
    weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    table = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight.data_ptr() != table.data_ptr():
        weights.pop(table.data_ptr())
    config = model.config
    width = (config.head_dim or config.hidden_size // config.num_attention_heads) * config.num_key_value_heads
    num_weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    return num_weight_bytes, 2 * config.num_hidden_layers * width * table.element_size()


def measure(
    name: str, model: PreTrainedModel, arguments: argparse.Namespace, bandwidth: float
) -> tuple[list[Figure], str]:
    """Return the figures of one model at every number of sequences, and how the engine computes it."""
    steps = arguments.steps + WARM_UP_STEPS
    first = max(1, arguments.context - steps // 2)
    most, max_context = max(arguments.sequences), BLOCK * math.ceil((first + steps) / BLOCK)
    # Before the engine takes the weights.
    num_weight_bytes, num_token_bytes = bytes_read(model)
    engine = Engine(model, max_sequences=most, max_context=max_context, cache_tokens=most * max_context)
    figures = []
    for num_sequences in arguments.sequences:
        keys = [str(i) for i in range(num_sequences)]
        generator = torch.Generator().manual_seed(num_sequences)
        for key in keys:
            engine.open(key)
            tokens = torch.randint(engine.num_token_ids, (first,), generator=generator).tolist()
            for start in range(0, first, MAX_STEP_TOKENS):
                engine.step([Work(key, tokens[start : start + MAX_STEP_TOKENS], [])])
        times_ms = [_timed_step(engine, keys, number) for number in range(steps)][WARM_UP_STEPS:]
        for key in keys:
            engine.close(key)
        step_ms = statistics.median(times_ms)
        num_bytes = num_weight_bytes + num_token_bytes * num_sequences * (first + steps // 2)
        figure = Figure(
            model=name,
            sequences=num_sequences,
            step_ms=step_ms,
            read_bytes=num_bytes,
            share=num_bytes / (step_ms / 1e3) / bandwidth,
        )
        say(f"{name}, {num_sequences} sequences: {step_ms:.2f} ms")
        figures.append(figure)
    return figures, engine.description


def _timed_step(engine: Engine, keys: Sequence[str], number: int) -> float:
    work = [Work(key, [1 + (number + i) % 100], [0]) for i, key in enumerate(keys)]
    synchronise()
    start = time.perf_counter()
    engine.step(work)
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Return the bytes a second that a large copy on the device reads and writes."""
    num_bytes = COPY_BYTES if device.startswith("cuda") else COPY_BYTES // 16
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_s = []
    for _ in range(10):
        synchronise()
        start = time.perf_counter()
        target.copy_(source)
        synchronise()
        times_s.append(time.perf_counter() - start)
    return 2 * num_bytes / statistics.median(times_s[2:])


def table(figures: Sequence[Figure]) -> str:
    """Return the figures, and what a guide costs beside the base."""
    base = {figure.sequences: figure.step_ms for figure in figures if figure.model.startswith("base")}
    rows = [
        [
            figure.model,
            str(figure.sequences),
            f"{figure.step_ms:.2f}",
            f"{figure.tokens_per_s:.0f}",
            f"{figure.read_bytes / 1e9:.2f}",
            f"{100 * figure.share:.0f} %",
            f"{figure.step_ms / base[figure.sequences]:.2f}",
        ]
        for figure in figures
    ]
    header = ["model", "sequences", "step, ms", "tokens/s", "GB read", "of the bandwidth", "of the base's time"]
    return markdown(header, rows)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--base-size", choices=SIZES, default="8b")
    parser.add_argument("--guide-size", choices=SIZES, default="1b")
    parser.add_argument("--sequences", type=positives, default=[1, 4, 16, 64])
    parser.add_argument("--context", type=positive, default=512, help="tokens of each sequence, on the average")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--bandwidth-gb-s", type=float, help="of the device's memory; measured if absent")
    parser.add_argument("--output", type=type(RESULTS), default=RESULTS)
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write it down; return what was written as JSON."""
    arguments = parse(command_line)
    machine = describe(torch.get_num_threads(), arguments.dtype)
    if arguments.device.startswith("cuda"):
        machine["GPU"] = torch.cuda.get_device_name(arguments.device)
    bandwidth = arguments.bandwidth_gb_s * 1e9 if arguments.bandwidth_gb_s else copy_bandwidth(arguments.device)
    machine["bandwidth"] = f"{bandwidth / 1e9:.0f} GB/s, {'given' if arguments.bandwidth_gb_s else 'a large copy'}"
    machine["context"] = f"{arguments.context} tokens"
    figures = []
    for name, size in (("base", arguments.base_size), ("guide", arguments.guide_size)):
        say(f"building {name}, {size}")
        max_context = arguments.context + arguments.steps + WARM_UP_STEPS + BLOCK
        found, machine[f"{name}'s pass"] = measure(
            f"{name}, {size}", build(size, arguments, max_context), arguments, bandwidth
        )
        figures += found
    text = "\n".join(f"* {key}: {value}" for key, value in machine.items()) + f"\n\n{table(figures)}\n"
    print(text)
    result = {"machine": machine, "options": plain(arguments), "figures": [asdict(figure) for figure in figures]}
    write("gpu", arguments.output, result, text)
    return result


if __name__ == "__main__":
    main()
