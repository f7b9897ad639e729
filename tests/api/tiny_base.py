"""A tiny random Llama with a tokenizer and a chat template, and PEFT adapters for it, written as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_LENGTH = 256
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "The restaurant on the river serves good food at a low price.",
    "A family friendly place near the station, with an average rating.",
    "Wir können überall 日本語 and emoji 🎉 write.",
]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of 400 entries, special ones counted; text gets a `<s>` before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def write_base(folder: Path) -> None:
    """Weights large enough that greedy outputs vary."""
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def write_adapter(base: Path, folder: Path, method: str, seed: int = 1) -> None:
    """A PEFT folder with non-trivial values: lora, ia3, prompt or prefix."""
    torch.manual_seed(seed)
    common = {"task_type": TaskType.CAUSAL_LM}
    configs: dict[str, PeftConfig] = {
        "lora": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], **common),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **common),
        "prompt": PromptTuningConfig(num_virtual_tokens=5, **common),
        "prefix": PrefixTuningConfig(num_virtual_tokens=6, **common),
    }
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), configs[method])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if method == "ia3" else 0.0, 0.5)
    model.save_pretrained(folder)
