"""Reads lm-eval's index of 14,000 tasks at import, 8 CPU seconds, which processes forked afterwards need not spend."""

from misa_engine.evaluation.harness import installed, manager

if installed():
    manager()
