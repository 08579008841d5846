"""Growth without retraining: a larger model that computes what the smaller one did."""

from metastate.growth.expand import grow, grow_in_training, grow_moments, grow_state, grown_config
from metastate.growth.meta_layers import upgrade, upgraded_config
from metastate.growth.verify import growth_report, logits_change

__all__ = [
    "grow",
    "grow_in_training",
    "grow_moments",
    "grow_state",
    "grown_config",
    "growth_report",
    "logits_change",
    "upgrade",
    "upgraded_config",
]
