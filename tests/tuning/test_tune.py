"""Each method learns, keeps its best step, and saves what PEFT loads and what the server will compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.tuning import TuneError, TuneSettings, read_examples
from server.tuning.adapter import new_adapter
from server.tuning.base import load_base, quiet_libraries
from server.tuning.trainer import TuneReport, tune

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt", "virtual_tokens": 5, "learning_rate": 0.1},
    "prompt from text": {"method": "prompt", "init": "text:say yes", "learning_rate": 0.1},
    "prompt from vocabulary": {"method": "prompt", "init": "vocabulary", "virtual_tokens": 4, "learning_rate": 0.1},
    "prefix": {"method": "prefix", "virtual_tokens": 5, "learning_rate": 0.05},
    "prefix from text": {"method": "prefix", "init": "text:say yes", "learning_rate": 0.05},
    "projected prefix": {"method": "prefix", "projection": True, "virtual_tokens": 5, "learning_rate": 0.01},
    "ptuning": {"method": "ptuning", "virtual_tokens": 5, "learning_rate": 0.01},
    "ia3": {"method": "ia3", "learning_rate": 0.05},
    "lora": {"method": "lora", "rank": 4, "learning_rate": 0.01},
}


class Recorder:
    """Keeps the validation losses."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def started(self, steps: int) -> None:
        self.steps = steps

    def stepped(self, step: int, loss: float) -> None:
        self.last_step = step

    def validated(self, step: int, loss: float, best: bool) -> None:
        assert best == (not self.losses or loss < min(self.losses.values()))
        self.losses[step] = loss


def run(base: Path, data: Path, output: Path, **changes: Any) -> tuple[TuneReport, Recorder]:
    recorder = Recorder()
    given: dict[str, Any] = {"model": str(base), "data": data, "output": output, "epochs": 6, "batch_size": 8}
    return tune(TuneSettings(**(given | changes)), recorder), recorder


def served_loss(base: Path, adapter: Path, data: Path) -> float:
    """Mean loss per output token of the saved adapter, one unpadded example at a time, as the server computes it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with quiet_libraries():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total, tokens = 0.0, 0
    for example in read_examples(data):
        prompt = tokenizer(f"{example.input}\n")["input_ids"]
        output = [*tokenizer(example.output)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + output])).logits[0, -len(output) - 1 : -1]
        total += cross_entropy(logits, torch.tensor(output), reduction="sum").item()
        tokens += len(output)
    return total / tokens


@pytest.mark.parametrize("case", METHODS)
def test_a_saved_adapter_reproduces_the_lowered_loss_alone_and_unpadded(
    base_folder: Path, data: Path, tmp_path: Path, case: str
) -> None:
    output = tmp_path / "adapter"
    report, recorder = run(base_folder, data, output, validation=data, template="{{ input }}\n", **METHODS[case])
    assert report.best_loss < 0.7 * report.initial_loss
    assert report.best_loss == min(recorder.losses.values()) == recorder.losses[report.best_step]
    assert served_loss(base_folder, output, data) == pytest.approx(report.best_loss, abs=1e-4)
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-base"


def test_a_text_start_says_to_the_base_what_the_text_says(base_folder: Path) -> None:
    base, tokenizer = load_base(str(base_folder))
    text, ids = torch.tensor([tokenizer("say yes")["input_ids"]]), torch.tensor([tokenizer("and so")["input_ids"]])
    with torch.no_grad():
        expected = base(input_ids=torch.cat([text, ids], 1)).logits[:, text.shape[1] :]
    for method in ("prompt", "prefix"):
        settings = TuneSettings(
            method=method,
            model=str(base_folder), data=Path("d"), output=Path("o"), init="text:say yes",
        )  # fmt: skip
        model = new_adapter(load_base(str(base_folder))[0], tokenizer, settings).eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_training_that_gets_worse_stops_early_and_keeps_the_best_step(
    base_folder: Path, data: Path, tmp_path: Path
) -> None:
    report, recorder = run(
        base_folder, data, tmp_path / "adapter",
        method="lora", validation=data, learning_rate=30.0, epochs=50, patience=2, template="{{ input }}\n",
    )  # fmt: skip
    assert report.stopped_early
    assert recorder.last_step == report.steps < recorder.steps
    assert recorder.losses[report.best_step] == min(recorder.losses.values())
    assert max(recorder.losses) > report.best_step, "a worse step came after the best one"
    assert served_loss(base_folder, report.output, data) == pytest.approx(report.best_loss, rel=1e-3)


def test_the_same_seed_gives_the_same_adapter(base_folder: Path, data: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("first", "second"):
        torch.rand(1)  # the caller's random state has no say
        run(base_folder, data, tmp_path / name, method="prompt", epochs=1, virtual_tokens=3)
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_an_example_too_long_for_the_base_is_refused_by_line(
    base_folder: Path, write_lines: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_lines({"input": "a", "output": "b"}, {"input": "a" * 90, "output": "b"})
    with pytest.raises(TuneError, match="line 2: 90 prompt and 2 output tokens are more than the 91"):
        run(base_folder, data, tmp_path / "adapter", method="prompt", virtual_tokens=5)


def test_an_empty_prompt_needs_virtual_tokens_of_embeddings(
    base_folder: Path, write_lines: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_lines(*({"input": "", "output": "b"} for _ in range(3)))
    with pytest.raises(TuneError, match="the prompt is empty"):
        run(base_folder, data, tmp_path / "lora", method="lora")
    report, _ = run(base_folder, data, tmp_path / "prompt", method="prompt", learning_rate=0.1)
    assert report.best_loss < report.initial_loss


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ input", "^template: "), ("{{ inputs.city }}", "line 1: the template cannot be filled: 'inputs'")],
)
def test_a_template_that_cannot_be_used_is_refused(
    base_folder: Path, write_lines: Callable[..., Path], tmp_path: Path, template: str, message: str
) -> None:
    data = write_lines(*({"input": "a", "output": "b"} for _ in range(3)), name="same.jsonl")
    with pytest.raises(TuneError, match=message):
        run(base_folder, data, tmp_path / "adapter", method="lora", validation=data, seed=3, template=template)


def test_a_model_that_is_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=r"^model: "):
        run(tmp_path / "absent", data, tmp_path / "adapter", method="lora")


def test_target_modules_that_the_base_lacks_are_refused(base_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=r"lora: .*nowhere"):
        run(base_folder, data, tmp_path / "adapter", method="lora", target_modules=("nowhere",))
