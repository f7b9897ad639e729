"""The engine: sequences in, tokens out.

    protocol, channel   what the HTTP and the engine process say to each other, and how
    client              the HTTP process's side of it
    process, loop       the engine process: socket, threads, stepping
    engine              one step: admit, schedule, run, sample, commit
    sequence, pages, prefixes, page_cache, shared_text, scheduler   plain Python: who runs next, on which KV pages
    batch, runner, sampler                 tensors: the step's batch, its run, its choices

Import from the modules: the HTTP side takes `protocol`, `channel` and `client`, which know no torch.
"""
