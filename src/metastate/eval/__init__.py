"""Evaluation: held-out loss, tasks, comparisons with figures and page, checks of the backends."""
