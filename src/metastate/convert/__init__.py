"""Other projects' checkpoint formats: pure maps of keys and layouts, there and back."""
