"""What the commands that use a model take: help texts and options; nothing here needs torch."""

from __future__ import annotations
