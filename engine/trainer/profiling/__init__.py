"""`--profile`: where a training step spends its time, FLOPs, bytes and memory."""
