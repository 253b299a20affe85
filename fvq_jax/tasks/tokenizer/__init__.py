"""Training tokenizers: fields and checks of their configs, losses, evaluation, and the task itself."""
