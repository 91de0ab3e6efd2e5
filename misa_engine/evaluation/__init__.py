"""Evaluation of trained models: lm-eval's tasks, the LLM-Adapters protocol, reasoning problems and forgetting."""

from misa_engine.evaluation.results import Comparison, Evaluation, Record, Result
from misa_engine.evaluation.run import evaluate
from misa_engine.evaluation.settings import Settings
from misa_engine.evaluation.statistics import Estimate, Paired
from misa_engine.evaluation.subjects import Subject

__all__ = ["Comparison", "Estimate", "Evaluation", "Paired", "Record", "Result", "Settings", "Subject", "evaluate"]
