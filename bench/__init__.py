"""Benchmarks and profiles against the baselines; installed as ``misa_engine.bench``, run by ``misa bench``."""
