"""What a training run would cost, from a config alone: operations, memory, the longest context that fits, time."""
