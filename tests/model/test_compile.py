"""torch.compile takes a recurrent model as one graph: nothing asks for a tensor's value."""

import pytest
import torch

from metastate.model.lm import LanguageModel
from metastate.model.presets import preset
from tolerance import TOLERANCE, relative_error


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [("metastate", "cpu"), ("metastate", "chunked"), ("rwkv7", "cpu")],
)
@pytest.mark.parametrize("memory", [{"memory_heads": None}, {"memory_heads": 2, "memory_layer": 1}])
def test_a_model_is_one_graph(architecture, backend, memory):
    torch.compiler.reset()  # models of other tests would count against the limit of recompilations
    config = preset(
        f"{architecture}-tiny",
        vocab_size=31,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        **memory,
    )
    model = LanguageModel(config).eval()
    for p in model.parameters():
        if not p.any():  # an output that starts at zero would hide its layer
            torch.nn.init.normal_(p, std=0.1)
    model.backend = backend
    tokens = torch.randint(31, (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, carried = model(tokens)
        found, state = compiled(tokens)
        again, _ = compiled(tokens, state)
        whole, _ = model(torch.cat([tokens, tokens], 1))
    assert relative_error(found, expected) < TOLERANCE[torch.float32]
    assert relative_error(torch.cat([found, again], 1), whole) < TOLERANCE[torch.float32]
    assert state.tokens_seen == carried.tokens_seen
