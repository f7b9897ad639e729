"""Benchmarks: Medley beside its peers, the same work in one run, as rates and ratios.

`python -m benchmarks` runs the CPU set, saves how long that took and draws its picture; each benchmark is also a
command of its own:

base           the base alone beside the machine's limit, Hugging Face and vLLM
mixed          each method's tasks mixed, all methods at once, beside PEFT
many           thousands of tasks
small          a small base's step outside its matrix products
long_prompts   a long prompt's arrival among streams
http           HTTP beside the same work in-process
shared         what is computed and held once for many requests
fairness       a client that sends too much
memory         what is held, and at start-up
index          the store's index at its planned size

They share

frame          machine, alternation, targets, report
figure         the picture of the saved reports: systems compared, figures beside their targets
bases          random-weight Llama bases of given sizes
adapters       random adapters of each method, saved by PEFT itself
workload       tasks, jobs and runs: what all systems are given and what they give back
inprocess      engines in the benchmark's process, of any size; `medley` is one for a workload
servers        `medley serve` and others as processes; `http_client` asks them
peft_peer      Hugging Face `generate` and PEFT, each method in the best way that PEFT has for it
vllm_peer      vLLM's CPU build
limit          what the machine's matrix products allow
index_fill     synthetic tasks and customizations, as the index's own calls write them
agreement      the check before any timing: all give the same greedy tokens
"""
