"""Evaluation of trained models. Each evaluator is a subclass of `evaluator.Evaluator`; `runner.evaluate` runs them.

The results are JSON files in the run's folder. Figures and reports are made from these files alone.
"""
