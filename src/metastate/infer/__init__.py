"""Generation: sampling and streaming."""
