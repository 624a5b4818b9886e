"""Compiles the attention kernels for a GPU's compute capability, with no GPU; prints the shared memory that each takes.

python -m tests.unit.actors.engine.passes.compile_kernels 90
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from actors.engine.passes.paged import kernels
from actors.engine.passes.paged.attention import NUM_SPLITS, kernel_sizes, tile_tokens

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

MODELS = {
    # dtype, query heads, key-value heads, width of a head
    "Llama 3 8B": (torch.bfloat16, 32, 8, 128),
    "Qwen2 7B": (torch.bfloat16, 28, 4, 128),
    "Gemma 2 9B": (torch.bfloat16, 16, 8, 256),
    "StarCoder": (torch.float16, 48, 1, 128),
    "SmolLM2 135M": (torch.float32, 9, 3, 64),
    "Gemma 2 9B in float32": (torch.float32, 16, 8, 256),
}

ALIGNED = {"query", "keys", "values", "output", "parts", "states", "query_head_stride", "query_token_stride"}
"""Arguments that a launch finds to be multiples of 16, which decides how memory is read."""


def compiled(kernel: Any, dtype: torch.dtype, constants: dict[str, int], capability: int) -> Any:
    """Return a kernel's binary and what is known of it."""
    numbers = dict.fromkeys(("query", "keys", "values", "output"), f"*{TYPES[dtype]}")
    types = {
        **numbers,
        **dict.fromkeys(("parts", "states"), "*fp32"),
        **dict.fromkeys(("positions", "tiles", "blocks"), "*i64"),
        **dict.fromkeys(("scale", "cap"), "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    used = {name: value for name, value in constants.items() if name in signature}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in ALIGNED}
    return compile(ASTSource(kernel, signature, used, attributes), target=GPUTarget("cuda", capability, 32))


def main() -> None:
    """Compile both kernels for every kind of model, for single tokens and for prompts."""
    capability = int(sys.argv[1])
    for name, (dtype, num_heads, num_key_heads, width) in MODELS.items():
        most = tile_tokens(group=num_heads // num_key_heads, width=width, itemsize=dtype.itemsize)
        for tokens, splits in ((1, NUM_SPLITS), (most, 1)):
            sizes = kernel_sizes(
                num_heads=num_heads,
                num_key_heads=num_key_heads,
                key_width=width,
                value_width=width,
                itemsize=dtype.itemsize,
                num_tokens=tokens,
            )
            constants = {**sizes, "SPLITS": splits, "IS_CAPPED": name.startswith("Gemma 2 ")}
            for kernel in [kernels.attend, kernels.join] if splits > 1 else [kernels.attend]:
                result = compiled(kernel, dtype, constants, capability)
                assert result.asm["cubin"]
                print(f"{name}, {tokens} tokens, {kernel.fn.__name__}: {result.metadata.shared}")


if __name__ == "__main__":
    main()
