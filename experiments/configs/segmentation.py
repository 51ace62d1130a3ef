"""The presets that `python -m experiments.segmentation` starts from."""

from experiments.configs.cifar import Config

PRESETS: dict[str, Config] = {
    "cpu": Config(
        preset="cpu",
        dataset="composed",
        model="unet-small",
        epochs=3,
        batch_size=16,
        learning_rate=0.1,
        label_smoothing=0.0,
        calibration_size=128,
        test_limit=500,
    ),
    "gpu": Config(
        preset="gpu",
        dataset="composed",
        model="unet",
        epochs=60,
        batch_size=64,
        label_smoothing=0.0,
        dtype="bfloat16",
        steps_per_dispatch=20,
    ),
    "smoke": Config(
        preset="smoke",
        dataset="composed",
        model="unet-small",
        epochs=2,
        batch_size=32,
        label_smoothing=0.0,
        train_limit=320,
        calibration_size=16,
        test_limit=50,
        reverse_pruning_every=5,
    ),
}
