"""Launching: Ray actors, Tune, Optuna, MLflow, the journal, the command line."""
