"""Checkpoints of other programs, read and written: the only place where foreign names live."""
