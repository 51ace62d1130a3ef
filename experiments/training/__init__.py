"""Train a network from a config: program, step, loop, checkpoints, and what follows a divergence."""
