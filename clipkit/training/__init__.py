"""The parts of a training run: optimizer, schedule, precision, processes, checkpoints, log."""
