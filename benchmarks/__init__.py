"""Benchmarks: Medley beside its peers, the same work in one run, as rates and ratios.

bases       random-weight Llama bases of given sizes
adapters    random adapters of each method, saved by PEFT itself
workload    tasks, jobs and runs: what both systems are given and what they give back
medley      Medley's engine, in this process
peft_peer   Hugging Face `generate` and PEFT, each method in the best way that PEFT has for it
agreement   the check before any timing: both give the same greedy tokens
report      the machine's facts and the table
mixed       the command: base only, each method's tasks mixed, all methods at once
"""
