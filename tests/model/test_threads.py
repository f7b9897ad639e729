"""The check of OpenMP's settings, in processes of their own: they are read when it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from server.errors import StartupError
from server.model.threads import check_threads
torch.set_num_threads(3)
try:
    check_threads()
except StartupError as error:
    print(error)
else:
    print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "3"),
        ({"OMP_THREAD_LIMIT": "3"}, "3"),
        (
            {"OMP_THREAD_LIMIT": "2"},
            "OMP_THREAD_LIMIT=2 is below torch's thread count, 3; set OMP_NUM_THREADS=2 instead",
        ),
        ({"OMP_DYNAMIC": "true"}, "OMP_DYNAMIC lets operations have fewer threads than torch counts on; unset it"),
    ],
)
def test_fewer_threads_than_torch_counts_on_are_refused(variables: dict[str, str], said: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == said
