"""The layers: nn.Modules, forward(x, state) -> (y, state)."""
