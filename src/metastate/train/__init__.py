"""Training: optimizer, checkpoints that survive any kill, the loop; tuning of a first state."""
