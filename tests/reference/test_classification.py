"""Classification heads: the same scores as their own libraries alone, in one batch with texts that are generated."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    LlamaForSequenceClassification,
)

from server.adapters import Checkpoint, read_adapter
from server.engine.engine import Engine
from server.engine.protocol import Classification
from server.errors import AdapterError
from server.model import FrozenBase
from tests.golden.adapterhub.reference import HERE
from tests.harness import alone, greedy, make_engine, request, run

SEQ_CLS = "SEQ_CLS"
LABELS = {"lora": 3, "ia3": 2, "prompt": 4, "p_tuning": 3, "prefix": 2, "one_output": 1}
HUB = {
    "head_classification": ("single", ["negative", "neutral", "positive"]),
    "head_multilabel": ("multiple", [f"LABEL_{index}" for index in range(4)]),
    "head_one_layer": ("single", ["LABEL_0", "LABEL_1"]),
    "head_regression": ("regression", ["LABEL_0"]),
    "head_score": ("single", ["LABEL_0", "LABEL_1", "LABEL_2"]),
}
PROMPTS = [[7, 41, 19, 3, 58], [12], [12, 33, 5, 61, 24, 9, 47, 16, 30, 52, 11]]


def _configs() -> dict[str, PeftConfig]:
    return {
        "lora": LoraConfig(task_type=SEQ_CLS, r=3, target_modules=["q_proj", "down_proj"]),
        "ia3": IA3Config(task_type=SEQ_CLS, target_modules=["k_proj"], feedforward_modules=[]),
        "prompt": PromptTuningConfig(task_type=SEQ_CLS, num_virtual_tokens=5),
        "p_tuning": PromptEncoderConfig(task_type=SEQ_CLS, num_virtual_tokens=3, encoder_hidden_size=24),
        "prefix": PrefixTuningConfig(task_type=SEQ_CLS, num_virtual_tokens=4),
        "one_output": LoraConfig(task_type=SEQ_CLS, r=2, target_modules=["v_proj"]),
    }


def _classifier(num_labels: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(HERE / "base", num_labels=num_labels, pad_token_id=0)
    return LlamaForSequenceClassification.from_pretrained(HERE / "base", config=config).eval()


def _save(name: str, config: PeftConfig, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = get_peft_model(_classifier(LABELS[name]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if name == "ia3" else 0.0, 0.4)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return FrozenBase(AutoModelForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with heads as PEFT saves them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, about these tiny bases
        paths = {name: tmp_path_factory.mktemp(name) for name in LABELS}
        for seed, (name, config) in enumerate(_configs().items()):
            _save(name, config, paths[name], seed)
    return paths


def _peft_logits(name: str, folder: Path, prompt: list[int]) -> list[float]:
    model = PeftModel.from_pretrained(_classifier(LABELS[name]), folder).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logits: list[float] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].tolist()
    return logits


def _run(engine: Engine, requests: list[Any], seed: int) -> tuple[dict[str, Any], dict[str, Classification]]:
    """Every result, and what the heads said."""
    said: dict[str, Classification] = {}
    step = engine.step

    def watched() -> Any:
        output = step()
        said.update({tokens.id: tokens.classification for tokens in output.tokens if tokens.classification})
        return output

    engine.step = watched  # type: ignore[method-assign]
    results = run(engine, requests, random.Random(seed)).results
    engine.close()
    return results, said


@pytest.mark.parametrize(("page_size", "num_pages"), [(16, 200), (3, 40)], ids=["roomy", "odd-pages"])
def test_heads_answer_as_alone_beside_generated_texts(
    base: FrozenBase, folders: dict[str, Path], page_size: int, num_pages: int
) -> None:
    requests, expected = [], {}
    for name, folder in folders.items():
        for index, prompt in enumerate(PROMPTS):
            requests.append(request(f"{name}/{index}", prompt, greedy(0), folder, classify=True))
            kind = "single" if LABELS[name] > 1 else "regression"
            labels = [f"LABEL_{label}" for label in range(LABELS[name])]
            expected[f"{name}/{index}"] = (kind, labels, _peft_logits(name, folder, prompt))
    for case, (kind, labels) in HUB.items():
        folder = HERE / "cases" / case
        for index, row in enumerate(json.loads((folder / "expected.json").read_text())):
            requests.append(request(f"{case}/{index}", row["prompt"], greedy(0), folder, classify=True))
            expected[f"{case}/{index}"] = (kind, labels, row["class_logits"])
    requests += [request(f"text/{index}", prompt, greedy(8)) for index, prompt in enumerate(PROMPTS)]
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=24)
    results, said = _run(engine, requests, page_size)
    assert said.keys() == expected.keys()
    for name, (kind, labels, logits) in expected.items():
        assert (said[name].kind, said[name].labels) == (kind, labels), name
        assert said[name].logits == pytest.approx(logits, abs=1e-4), name
        assert (results[name].tokens, results[name].ends) == ([], 1)
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager")
    for index, prompt in enumerate(PROMPTS):
        assert results[f"text/{index}"].tokens == alone(model, prompt, 8).tokens


def test_a_padded_step_leaves_room_for_classification(base: FrozenBase, folders: dict[str, Path]) -> None:
    """Rows of one token would go into a graph, which has no states."""
    engine = make_engine(base)
    engine._runner.pad_decode_steps()
    engine._batches = engine._runner.batch_builder()
    requests = [request("class", [12], greedy(0), folders["lora"], classify=True), request("text", [7], greedy(9))]
    _, said = _run(engine, requests, 1)
    assert said["class"].logits == pytest.approx(_peft_logits("lora", folders["lora"], [12]), abs=1e-4)


def test_generating_with_a_head_and_classifying_without_one_are_refused(
    base: FrozenBase, folders: dict[str, Path]
) -> None:
    engine = make_engine(base)
    requests = [
        request("generates", [7], greedy(3), folders["lora"]),
        request("base", [7], greedy(0), classify=True),
        request("no-head", [7], greedy(0), HERE / "cases" / "lora", classify=True),
    ]
    results, said = _run(engine, requests, 2)
    assert not said
    for name, word in {"generates": "classify", "base": "no classification head", "no-head": "no classif"}.items():
        failed = results[name].failed
        assert failed is not None
        assert failed.code == "invalid_request"
        assert word in failed.message


def test_a_peft_head_that_is_missing_is_named(base: FrozenBase, folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders["lora"], base.dtype)
    checkpoint.take("base_model.model.score.weight", (3, 32))
    with pytest.raises(AdapterError, match=r"score\.weight") as caught:
        read_adapter(checkpoint, base.shape)
    assert caught.value.code == "base_mismatch"


@pytest.mark.parametrize("kind", [TaskType.TOKEN_CLS, TaskType.QUESTION_ANS, TaskType.FEATURE_EXTRACTION])
def test_another_task_of_peft_is_refused_by_its_type(base: FrozenBase, tmp_path: Path, kind: TaskType) -> None:
    classes = {
        TaskType.TOKEN_CLS: AutoModelForTokenClassification,
        TaskType.QUESTION_ANS: AutoModelForQuestionAnswering,
        TaskType.FEATURE_EXTRACTION: AutoModel,
    }
    config = AutoConfig.from_pretrained(HERE / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tiny bases
        for method in (LoraConfig(task_type=kind), PromptTuningConfig(task_type=kind, num_virtual_tokens=3)):
            folder = tmp_path / type(method).__name__
            get_peft_model(classes[kind].from_config(config), method).save_pretrained(folder)
            with pytest.raises(AdapterError, match=f"task_type is '{kind.value}'") as caught:
                read_adapter(Checkpoint.open(folder, base.dtype), base.shape)
            assert (caught.value.code, caught.value.param) == ("unsupported_method", "task_type")


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"activation_function": "made_up"}, "unsupported_method", "made_up"),
        ({"label2id": {"a": 0, "b": 1}}, "bad_config", "label2id"),
        ({"label2id": {"a": 0, "b": 1, "c": 1}}, "bad_config", "label2id"),
        ({"head_type": "tagging"}, "unsupported_method", "prediction head"),
    ],
    ids=str,
)
def test_a_bad_adapterhub_head_is_refused(base: FrozenBase, changes: dict[str, Any], code: str, says: str) -> None:
    checkpoint = Checkpoint.open(HERE / "cases" / "head_classification", base.dtype)
    assert checkpoint.head_config is not None
    checkpoint.head_config["config"].update(changes)
    with pytest.raises(AdapterError, match=says) as caught:
        read_adapter(checkpoint, base.shape)
    assert caught.value.code == code
