"""Autocast rounds the products around the recurrences, never the recurrences themselves."""

import pytest
import torch

from metastate import ops


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("grad", [False, True])
def test_float32_inputs_are_not_rounded(backend, length, grad):
    r, k, v, x, d, c = torch.randn(6, 2, length, 2, 8).requires_grad_(grad)
    kappa = torch.nn.functional.normalize(k, dim=-1)
    state = torch.randn(2, 2, 8, 8)

    def run():
        log_w, a = -0.6 * torch.sigmoid(d), torch.sigmoid(c)
        y, trajectory = ops.wkv7_trajectory(r, log_w, k, v, kappa, a, state, backend=backend)
        out = [y, trajectory.state, trajectory.read(x), trajectory.read(x, by="value")]
        for update in ("delta", "input", "self"):
            out += ops.meta_state(x, v, None, trajectory, state, update=update, backend=backend)
        return out

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)
