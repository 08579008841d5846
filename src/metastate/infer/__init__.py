"""Running a model: generation, an engine for many requests, the server, what a state holds."""
