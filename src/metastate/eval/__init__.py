"""Evaluation: held-out loss, plots, model descriptions."""
