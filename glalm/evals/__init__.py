"""What a trained model is worth: each evaluator is a function of a model and data; `run.evaluate` runs them.

Results are JSON files in the run's directory. The plots and the closing report are made from these files alone.
"""
