"""The planner: bytes and what fits a card, from a model's configuration alone."""
