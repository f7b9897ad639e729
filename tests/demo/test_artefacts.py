"""What is committed of the demo: small enough, whole, and in step with the table of tasks."""

import json
import warnings

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.tasks import ADAPTERS, BASE, BASE_NAME, RECIPES, read_tasks
from server.tuning.base import quiet_libraries

PEFT_TYPES = {
    "prompt": "PROMPT_TUNING",
    "prefix": "PREFIX_TUNING",
    "ptuning": "P_TUNING",
    "ia3": "IA3",
    "lora": "LORA",
}


def test_the_base_is_small_and_in_float16() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 10_000_000
    parameters = 0
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a dictionary
            tensor = weights.get_slice(name)
            assert tensor.get_dtype() == "F16", name
            parameters += weights.get_tensor(name).numel()
    assert parameters <= 5_000_000


def test_the_base_loads_without_a_warning_and_its_tokenizer_adds_nothing() -> None:
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for text in ("The Golden Garden serves cheap Thai food.\n", "Grüße, 世界 🙂\n"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_every_task_has_its_adapter_and_every_adapter_its_task() -> None:
    tasks = read_tasks()
    assert {task.task for task in tasks} == set(RECIPES)
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted(task.adapter for task in tasks)


@pytest.mark.parametrize("task", read_tasks(), ids=lambda task: task.task)
def test_an_adapter_is_of_the_method_of_its_recipe_and_names_no_path(task: object) -> None:
    entry = next(known for known in read_tasks() if known == task)
    folder = ADAPTERS / entry.adapter
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == PEFT_TYPES[RECIPES[entry.task].method]
    assert config["base_model_name_or_path"] == BASE_NAME
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000
