"""What `benchmarks.gpu` runs on: random Llamas of published shapes made on the device, and what bounds their steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from server.model import FrozenBase, KVCache


@dataclass(frozen=True)
class Shape:
    """A Llama's widths, and the work that fits it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feedforward: int
    vocabulary: int
    rows: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096)
    tasks: int = 64
    prompt: int = 2048  # of prefill


SHAPES = {
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256),
    "tiny": Shape(64, 2, 4, 2, 128, 512, rows=(1, 4), contexts=(16,), tasks=4, prompt=32),
}


def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Made where it stays."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feedforward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * max(*shape.contexts, shape.prompt) + 4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median seconds of a call, the device's own work included."""
    taken: list[float] = []
    for _ in range(repeats + 3):
        _wait_for(device)
        started = time.perf_counter()
        call()
        _wait_for(device)
        taken.append(time.perf_counter() - started)
    return median(taken[3:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    size = 2**31 if device.type == "cuda" else 2**22
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 256
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: left @ right, device)


def decode_bytes(base: FrozenBase, context: int) -> int:
    """What a step must read: the weights but the input embedding's, and all keys and values."""
    weights: int = sum(each.nbytes for each in base.model.parameters())
    embedding: int = base.model.get_input_embeddings().weight.nbytes
    return weights - embedding + context * KVCache.page_bytes(base.layers, 1, base.dtype)


def prefill_operations(shape: Shape, base: FrozenBase) -> float:
    """Of one token of a prompt, on average."""
    matrices: int = sum(each.numel() for each in base.model.parameters() if each.dim() == 2)
    weights = matrices - 2 * shape.vocabulary * shape.hidden  # embedding and head
    return 2 * weights + 2 * shape.prompt * shape.hidden * shape.layers  # causal: half of the scores
