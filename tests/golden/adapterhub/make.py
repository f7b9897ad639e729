"""Writes the base, the adapters and the answers of this folder with the `adapters` library itself.

Run as `python -m tests.golden.adapterhub.make` in the environment that README.md describes. The same environment
gives the same files. Answers are of one request alone, unpadded, float32, with eager attention and without a cache.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from adapters.composition import Fuse, Stack  # type: ignore[import-not-found]
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tests.golden.adapterhub.configurations import COMPOSED, HEADS, SINGLE, Composition

HERE = Path(__file__).parent
PROMPTS = [[7, 41, 19, 3, 58], [12, 33, 5, 61, 24, 9, 47, 16, 30, 52, 11]]
NEW_TOKENS = 8
NAME = "task"
# Pickled samples for the tests of the converter: kept as the library wrote them.
KEEP_BIN = {"seq_bn_rf4", "prefix"}
_BIN_TO_SAFE = {
    "pytorch_adapter.bin": "adapter.safetensors",
    "pytorch_model_head.bin": "model_head.safetensors",
    "pytorch_model_adapter_fusion.bin": "model_adapter_fusion.safetensors",
}


def make_base() -> None:
    """A Llama of three layers whose greedy answers vary."""
    torch.manual_seed(23)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=1.0, std=0.2)
            elif "self_attn" in name:
                parameter.normal_(std=0.4)
            elif "embed" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.22)
    model.save_pretrained(HERE / "base")
    (HERE / "base" / "generation_config.json").unlink()


def load(cls: Any = LlamaForCausalLM, **options: Any) -> Any:
    """The base as a class of `transformers` or of `adapters`, ready for adapters."""
    model = cls.from_pretrained(HERE / "base", attn_implementation="eager", **options)
    model.config.name_or_path = "tiny-llama"  # what the saved files name as their base
    if cls is not adapters.LlamaAdapterModel:
        adapters.init(model)
    return model.eval()


def perturb(model: Any, seed: str, marks: tuple[str, ...]) -> None:
    """Values that matter for every parameter whose name has a mark: the library starts many at zero or one."""
    torch.manual_seed(zlib.crc32(seed.encode()))
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in marks):
            with torch.no_grad():
                _spread(name, parameter)


def _spread(name: str, parameter: torch.Tensor) -> None:
    rest = name.rsplit(f".{NAME}.", maxsplit=1)[-1]
    if name.endswith("scaling") or "norm_" in rest:
        parameter.normal_(mean=1.0 if "bias" not in rest else 0.0, std=0.4)
    elif rest == "lora_B" and parameter.shape[1] == 1:  # (IA)³
        parameter.normal_(mean=1.0, std=0.4)
    elif rest == "m.weight":  # DoRA's magnitudes, which start at the rows' norms
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    elif "vera_" in rest or "value.weight" in rest or rest == "lm_head.weight":  # start diagonal, or as the base's
        parameter.add_(0.2 * torch.randn_like(parameter))
    elif any(word in rest for word in ("phm_rule", "W_", ".W", "control_trans", "wte")):
        parameter.normal_(std=0.6)
    else:
        parameter.normal_(std=0.3)


@torch.no_grad()
def answers(model: Any) -> list[dict[str, Any]]:
    """Greedy tokens, their log-probabilities, and the logits at the prompt's last position, per prompt."""
    found = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=False,  # the library's Llama ignores the cache that transformers 4.57 hands it: README.md
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, len(prompt) :]
        logits = torch.stack(output.logits)[:, 0]  # [NEW_TOKENS, vocabulary]
        best = logits.topk(2).values
        margin = (best[:, 0] - best[:, 1]).min().item()
        assert margin > 5e-4, f"two tokens are equally good ({margin:.1e}): change the seed of make_base"
        chosen = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found.append({"tokens": tokens.tolist(), "logprobs": chosen.tolist(), "last_logits": logits[0].tolist()})
    return found


@torch.no_grad()
def class_logits(model: Any) -> list[dict[str, Any]]:
    """What a classification head gives for each prompt."""
    return [{"class_logits": model(torch.tensor([prompt])).logits[0].tolist()} for prompt in PROMPTS]


def write_answers(folder: Path, found: list[dict[str, Any]]) -> None:
    """`expected.json`: nine digits give every float32 back exactly."""
    rows = [
        {"prompt": prompt} | {key: [round_trip(value) for value in values] for key, values in answer.items()}
        for prompt, answer in zip(PROMPTS, found, strict=True)
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    (folder / "expected.json").write_text(f"[\n{lines}\n]\n")


def round_trip(value: float) -> float:
    """The shortest decimal of nine digits."""
    return value if isinstance(value, int) else float(f"{value:.9g}")


def save(folder: Path, write: Callable[[bool], None]) -> str:
    """Let the library write safetensors; where it cannot, its pickles, converted here under the same names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write(True)
        return "safetensors"
    except RuntimeError as error:
        if "share memory" not in str(error):
            raise
    shutil.rmtree(folder)
    folder.mkdir()
    write(False)
    for pickled in list(folder.rglob("*.bin")):
        tensors = torch.load(pickled, weights_only=True)
        # A shared tensor is stored once per name.
        save_file(
            {key: value.clone().contiguous() for key, value in tensors.items()},
            pickled.with_name(_BIN_TO_SAFE[pickled.name]),
        )
        if folder.name not in KEEP_BIN:
            pickled.unlink()
    return "bin only"


def make_single(case: str, config: Any) -> str:
    """One adapter."""
    model, folder = load(), HERE / "cases" / case
    model.add_adapter(NAME, config=config, set_active=True)
    perturb(model, case, (f".{NAME}.",))
    form = save(folder, lambda safe: model.save_adapter(folder, NAME, with_head=False, use_safetensors=safe))
    if case in KEEP_BIN and form == "safetensors":
        model.save_adapter(folder, NAME, with_head=False, use_safetensors=False)
    write_answers(folder, answers(model))
    return form


def make_composed(case: str, composition: Composition) -> str:
    """Two adapters, stacked or fused: saved as the library's adapter setup."""
    model, folder = load(), HERE / "cases" / case
    for name, config in zip(("first", "second"), composition.adapters, strict=True):
        model.add_adapter(name, config=config)
    setup = Stack("first", "second")
    if composition.kind == "fuse":
        setup = Fuse("first", "second")
        model.add_adapter_fusion(setup, adapters.DynamicAdapterFusionConfig(**composition.fusion))
    model.set_active_adapters(setup)
    perturb(model, case, (".first.", ".second.", ".first,second."))
    form = save(folder, lambda safe: model.save_adapter_setup(folder, setup, use_safetensors=safe))
    for head in [*folder.rglob("head_config.json"), *folder.rglob("model_head.safetensors")]:
        head.unlink()  # the base's own lm_head, which the library adds to each
    write_answers(folder, answers(model))
    return form


def make_head(case: str, method: str, options: dict[str, Any]) -> str:
    """An adapter with a head of LlamaAdapterModel."""
    model, folder = load(adapters.LlamaAdapterModel), HERE / "cases" / case
    model.add_adapter(NAME, config=adapters.SeqBnConfig(reduction_factor=4), set_active=True)
    getattr(model, method)(NAME, **options)
    perturb(model, case, (f".{NAME}.",))
    form = save(folder, lambda safe: model.save_adapter(folder, NAME, use_safetensors=safe))
    write_answers(folder, answers(model) if method == "add_causal_lm_head" else class_logits(model))
    return form


def make_static_head(case: str, cls: Any, **options: Any) -> str:
    """An adapter with the head of a class of `transformers`: its whole output layer is in the file."""
    model, folder = load(cls, **options), HERE / "cases" / case
    model.add_adapter(NAME, config=adapters.SeqBnConfig(reduction_factor=4), set_active=True)
    perturb(model, case, (f".{NAME}.", "lm_head.weight", "score.weight"))
    form = save(folder, lambda safe: model.save_adapter(folder, NAME, use_safetensors=safe))
    write_answers(folder, answers(model) if cls is LlamaForCausalLM else class_logits(model))
    return form


def main() -> None:
    """Everything anew."""
    torch.set_num_threads(1)
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns in a forward pass of its own, made by add_adapter
    shutil.rmtree(HERE / "cases", ignore_errors=True)
    make_base()
    base = HERE / "cases" / "base"
    base.mkdir(parents=True)
    write_answers(base, answers(load()))
    made = {case: make_single(case, config) for case, config in SINGLE.items()}
    made |= {case: make_composed(case, composition) for case, composition in COMPOSED.items()}
    made |= {case: make_head(case, *arguments) for case, arguments in HEADS.items()}
    made["head_lm_head"] = make_static_head("head_lm_head", LlamaForCausalLM)
    made["head_score"] = make_static_head("head_score", LlamaForSequenceClassification, num_labels=3)
    for case, form in made.items():
        print(f"{case:28} {form}")


if __name__ == "__main__":
    main()
