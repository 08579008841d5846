"""Training: optimizer, checkpoints that survive any kill, the loop."""
