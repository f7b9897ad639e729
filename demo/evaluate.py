"""Scores base and adapters on the unseen examples with `transformers` and PEFT alone, without a server.

`python -m demo.evaluate` prints the table. Examples whose prompts have the same number of tokens are generated
together, so that nothing is padded.
"""

from collections import defaultdict

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.scores import BAR, TaskScores, as_table, share_right
from demo.skills import examples
from demo.tasks import ADAPTERS, BASE, RECIPES, TEST_EXAMPLES, TEST_SEED, DemoTask, read_tasks
from server.tuning.base import quiet_libraries


def generate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_tokens: int
) -> list[str]:
    """The greedy continuation of every prompt."""
    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    outputs = [""] * len(prompts)
    for length, indices in by_length.items():
        ids = torch.tensor([encoded[index] for index in indices])
        mask = torch.ones_like(ids)
        rows = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        for index, row in zip(indices, rows, strict=True):
            outputs[index] = tokenizer.decode(row[length:], skip_special_tokens=True)
    return outputs


def score_task(task: DemoTask, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TaskScores:
    """Scores of a task by each way of asking."""
    tests = examples(task.task, "test", TEST_EXAMPLES, TEST_SEED)
    plain = [task.template.replace("{{ input }}", test.input) for test in tests]
    asked = [f"{task.text_prompt}\n{prompt}" for prompt in plain]
    shares = {
        "base alone": share_right(task.task, tests, generate(base, tokenizer, plain, task.max_tokens)),
        "base + text prompt": share_right(task.task, tests, generate(base, tokenizer, asked, task.max_tokens)),
    }
    adapted = PeftModel.from_pretrained(base, ADAPTERS / task.adapter).eval()
    shares["adapter"] = share_right(task.task, tests, generate(adapted, tokenizer, plain, task.max_tokens))
    return TaskScores(task.task, RECIPES[task.task].method, shares)


def evaluate() -> list[TaskScores]:
    """Scores of every task, each on a base of its own: PEFT changes the modules of the one it wraps."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    scores = []
    for task in read_tasks():
        with quiet_libraries(), torch.inference_mode():
            base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
            scores.append(score_task(task, base, tokenizer))
    return scores


def main() -> int:
    """Print the table; 1 where a task misses the bar."""
    scores = evaluate()
    print(as_table(scores))
    missed = [row.task for row in scores if not row.reached]
    if missed:
        print(f"not at {BAR:.0%} (or reached without an adapter): {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
