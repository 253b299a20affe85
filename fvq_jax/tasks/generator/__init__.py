"""Training generators on codes: fields and checks of their configs, their codes, evaluation, and the task itself."""
