"""Training, from settings to a run directory: the Trainer, context extension and fine-tuning on answers."""
