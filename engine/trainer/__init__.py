"""Training of one stage: the step, its two DeepSpeed engines, checkpoints and logs."""
