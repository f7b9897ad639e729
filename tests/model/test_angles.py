"""The table of angles holds what the class's rotation gives, each position computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.model.angles import AngleTable
from server.model.module_calls import ModuleCall, recorded_calls
from tests.reference.bases import VOCABULARY

LONGEST = 600  # no whole number of the table's chunks
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 150},
}


def _call(rope: str) -> ModuleCall:
    """The call of a Llama's rotation in a forward pass."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, max_position_embeddings=LONGEST, rope_parameters=ROPES[rope], **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode(), recorded_calls([model.model.rotary_emb]) as calls:
        model(torch.arange(5)[None])
    (call,) = calls
    return call


@pytest.mark.parametrize("rope", ROPES)
@torch.inference_mode()
def test_angles_are_those_of_the_class_at_any_positions_in_any_order(rope: str) -> None:
    call = _call(rope)
    table = AngleTable(call, LONGEST)
    hidden = torch.zeros(1, 1, 32)
    for positions in ([0], [LONGEST - 1, 3, 3], list(range(LONGEST)), [255, 256, 511, 512]):
        own = call.module(hidden, torch.tensor([positions]))
        for given, expected in zip(table.at(torch.tensor(positions)), own, strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_a_position_is_computed_once_and_no_other_unless_it_is_near() -> None:
    call = _call("default")
    asked: list[int] = []

    class Counting(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked.extend(position_ids[0].tolist())
            cos, sin = call.module(hidden, position_ids)
            return cos, sin

    table = AngleTable(replace(call, module=Counting()), LONGEST)
    for positions in ([LONGEST - 1], [1], [LONGEST - 1, 0], [LONGEST - 2]):
        table.at(torch.tensor(positions))
    assert 300 not in asked, "between the two"
    table.at(torch.tensor([0, 300]))
    assert sorted(asked) == list(range(LONGEST))
