"""Figures, caught as they are drawn."""

import pytest

from metastate.eval import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, once for each format."""
    pytest.importorskip("matplotlib")
    found, plain = [], plots._bytes
    monkeypatch.setattr(plots, "_bytes", lambda fig, kind: found.append(fig) or plain(fig, kind))
    return found
