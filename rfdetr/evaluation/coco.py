"""`CocoEvaluator` under the name of the metrics that it computes."""

from __future__ import annotations

from rfdetr.evaluation.evaluator import CocoEvaluator, EvaluationResult

__all__ = ["CocoEvaluator", "EvaluationResult"]
