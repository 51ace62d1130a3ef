"""Train the study's networks in a quarter of an hour on one GPU: `python -m experiments.accelerator`."""
