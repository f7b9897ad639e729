"""`medley classify` against a server."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaForSequenceClassification

from tests.cli.conftest import Medley
from tests.server_process import ServerProcess, one_line


def write_classifier(base: Path, folder: Path, num_labels: int) -> None:
    """A LoRA with a head, saved by PEFT."""
    torch.manual_seed(4)
    config = AutoConfig.from_pretrained(base, num_labels=num_labels)
    classifier = LlamaForSequenceClassification.from_pretrained(base, config=config)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def test_labels_come_best_first_and_a_regression_is_a_number(
    medley: Medley, server: ServerProcess, base: Path, tmp_path: Path
) -> None:
    for task, count in (("three", 3), ("number", 1)):
        write_classifier(base, tmp_path / task, count)
        pushed = medley("push", task, str(tmp_path / task))
        assert pushed.returncode == 0, pushed.stderr
    answer = httpx.post(f"{server.url}/v1/tasks/three/classify", json={"input": "a river"}, timeout=60).json()
    expected = [f"{found['label']}\t{found['probability']:.4f}" for found in answer["labels"]]
    for result in (medley("classify", "three", "a river"), medley("classify", "three", stdin="a river\n")):
        assert result.stdout.splitlines() == ["label\tprobability", *expected]
    answer = httpx.post(f"{server.url}/v1/tasks/number/classify", json={"input": "a river"}, timeout=60).json()
    assert float(medley("classify", "number", "a river").stdout) == pytest.approx(answer["value"], abs=1e-4)
    refused = medley("generate", "three", "a river")
    assert refused.returncode == 1
    assert "/classify" in one_line(refused.stderr)
