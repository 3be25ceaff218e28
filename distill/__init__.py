"""Training one student: data, losses, hint configuration, trainer, evaluation."""
