"""The ``misa`` command: arguments, data, models, directories."""
