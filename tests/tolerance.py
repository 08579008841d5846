"""THE table of tolerances, and how errors are measured against it."""

import torch

# Relative error |x - x_ref|_max / |x_ref|_max against the float64 reference, one row a dtype.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def relative_error(x, expected) -> float:
    """Return max |x - expected| / max |expected|, in float64."""
    assert x.shape == expected.shape, f"{list(x.shape)} in place of {list(expected.shape)}"
    x, expected = x.detach().double(), expected.detach().double()
    return float((x - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def slopes(loss, p, size=1e-5):
    """Return the slope of loss() at p's entry of largest gradient: by differences, and p.grad's."""
    where = p.grad.abs().argmax()
    value = p.detach().view(-1)[where].item()
    found = []
    with torch.no_grad():
        for x in (value + size, value - size):
            p.view(-1)[where] = x
            found.append(loss().item())
        p.view(-1)[where] = value
    return (found[0] - found[1]) / (2 * size), p.grad.view(-1)[where].item()
