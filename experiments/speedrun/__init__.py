"""Train CIFAR-10 in seconds on one GPU, with Quant-Trim: `python -m experiments.speedrun`."""
