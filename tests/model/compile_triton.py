"""Compiles Triton's attention for devices that are not there. A program: what is interpreted cannot be compiled.

`python -m tests.model.compile_triton` prints a JSON line for each variant.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is first imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.model import triton_attention
from server.model.triton_attention import block_sizes, padded_width

WIDTHS = (  # compute capability, type of queries, keys and values, width of a head
    (80, torch.bfloat16, "bf16", 128),
    (80, torch.float16, "fp16", 256),
    (80, torch.float32, "fp32", 128),
    (90, torch.bfloat16, "bf16", 128),
)
_KINDS = {"rows of one token": (True, True, False), "any rows": (False, False, True)}
_POINTERS = {"tables": "i32", "starts": "i32", "lengths": "i32", "logs": "fp32", "parts": "fp32"}
_NUMBERS = {"scale": "fp32", "cap": "fp32"}
_ALIGNED = ("page_stride", "slot_stride", "head_stride")  # multiples of 16, as a head's width is
_STATED = [["tt.divisibility", 16]]


def compile_for(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: int
) -> dict[str, int]:
    """What the compiler has made of a kernel; `pointers` are the types of what is not of the same type everywhere."""
    pointers = {**_POINTERS, **pointers}
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{pointers[name]}"
        if name in pointers
        else _NUMBERS.get(name, "i32")
        for name in kernel.arg_names
    }
    attributes = {
        (at,): _STATED
        for at, name in enumerate(kernel.arg_names)
        if (name in pointers or name in _ALIGNED) and name not in triton_attention._VARYING
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    return {
        "shared": compiled.metadata.shared,
        "asynchronous": code.count("cp.async.c"),  # copies to shared memory
        "spilled": code.count("st.local"),
    }


def main() -> None:
    """Contexts divided and whole, without what a class may ask for and with all of it."""
    for capability, dtype, name, dim in WIDTHS:
        for kind, (is_decode, is_split, has_options) in _KINDS.items():
            sizes = block_sizes(16 if is_decode else 64, dim, dtype)
            options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
            flags = {
                "IS_DECODE": is_decode,
                "IS_SPLIT": is_split,
                "HAS_CAP": has_options,
                "HAS_SINKS": has_options,
            }
            constants = {**sizes, **flags, "PAGE": 16, "REPEATS": 4, "TOKENS": 1 if is_decode else 16}
            pointers = dict.fromkeys(("query", "keys", "values", "sinks"), name)
            pointers["outputs"] = "fp32" if is_split else name
            made = compile_for(capability, triton_attention._attend, pointers, constants, **options)
            print(json.dumps({"variant": f"sm_{capability}, {name}, heads of {dim}, {kind}", **made}), flush=True)
        constants = {"DIM": dim, "WIDTH": padded_width(dim), "SPLITS": triton_attention._SPLITS}
        compile_for(capability, triton_attention._combine, {"outputs": name}, constants)


if __name__ == "__main__":
    main()
