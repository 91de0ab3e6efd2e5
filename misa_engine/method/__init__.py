"""The method: options, what the units of a model are, and which of them train next. Knows torch only."""
