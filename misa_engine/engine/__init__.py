"""The engine: the optimizer, the buffers that matrices move through, and how gradients get there."""
