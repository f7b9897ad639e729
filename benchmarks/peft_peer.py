"""Hugging Face `generate` and PEFT, given the same jobs: each method in the best way that PEFT has for it.

    base only                           one static batch
    LoRA                                one static batch, mixed by `adapter_names`
    prompt tuning, prefix tuning, (IA)³ one static batch per task

The last three cannot be mixed there: with soft prompts and prefixes `generate` refuses `adapter_names`, with
(IA)³ it ignores it and gives every row the one active adapter.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.adapters import LORA
from benchmarks.bases import random_base
from benchmarks.workload import Job, Run, Task, Workload


class PeftPeer:
    """One copy of the base per method, with all of that method's adapters loaded before any timing."""

    def __init__(self, workload: Workload, tasks: dict[str, list[Task]]) -> None:
        """Load everything."""
        self._workload = workload
        self._base = random_base(workload.size, workload.length)
        self._models = {method: self._load(own) for method, own in tasks.items()}

    def _load(self, tasks: list[Task]) -> PeftModel:
        base = random_base(self._workload.size, self._workload.length)
        model = PeftModel.from_pretrained(base, tasks[0].folder, adapter_name=tasks[0].name)
        for task in tasks[1:]:
            model.load_adapter(task.folder, adapter_name=task.name)
        return model.eval()

    def run(self, jobs: list[Job]) -> Run:
        """All jobs, one batch after the other; switching from adapter to adapter is part of the time."""
        answers: list[list[int]] = [[] for _ in jobs]
        started = time.perf_counter()
        for indices in _batches(jobs):
            for index, answer in zip(indices, self._batch([jobs[index] for index in indices]), strict=True):
                answers[index] = answer
        return Run(answers, time.perf_counter() - started)

    def alone(self, job: Job) -> tuple[list[int], torch.Tensor]:
        """The reference: one request by itself. Its new tokens, and the logits `[new_tokens, vocabulary]`."""
        model: PreTrainedModel | PeftModel = self._base
        if job.task is not None:
            model = self._models[job.task.method]
            model.set_adapter(job.task.name)
        output = self._generate(model, [job], output_logits=True, return_dict_in_generate=True)
        return output.sequences[0, len(job.prompt) :].tolist(), torch.cat(output.logits)

    def _batch(self, jobs: list[Job]) -> list[list[int]]:
        """The new tokens of jobs that PEFT can run together."""
        task = jobs[0].task
        if task is None:
            output = self._generate(self._base, jobs)
        elif task.method == LORA:
            names = [job.task.name for job in jobs if job.task is not None]
            output = self._generate(self._models[LORA], jobs, adapter_names=names)
        else:
            model = self._models[task.method]
            model.set_adapter(task.name)
            output = self._generate(model, jobs)
        tokens: list[list[int]] = output[:, len(jobs[0].prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def _generate(self, model: PreTrainedModel | PeftModel, jobs: list[Job], **options: Any) -> Any:
        """Greedy, to the full length. Prompts are of one length, so that nothing is padded."""
        ids = torch.tensor([job.prompt for job in jobs])
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self._workload.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )


def _batches(jobs: list[Job]) -> list[list[int]]:
    """Indices of the jobs that PEFT can run together: base only, all LoRAs, each other task."""
    together: dict[tuple[str | None, str | None], list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        task = job.task
        key = (None, None) if task is None else (task.method, None if task.method == LORA else task.name)
        together[key].append(index)
    return list(together.values())
