"""Judge a detector by its boxes: `--metric detector:matched`.

The output is that of YOLOv8 and its like, `(n, 4 + classes, candidates)`: centre, width and height of each
candidate in pixels, then the score of each class. `python detector.py MODEL.onnx` writes c.npz and t.npz for
a model that reads 320 x 320 pixels in [0, 1]. The labels in t.npz are what the float model puts out.
"""

import sys

import matplotlib.cbook
import matplotlib.image
import numpy as np
import onnxruntime

SCORE, OVERLAP, MATCH = 0.2, 0.45, 0.5
"""Least score of a box; IoU from which on the lower of two boxes is dropped, and from which on two boxes of
two networks are the same object."""


def iou(box, others):
    """Return what one box shares with each of the others, divided by what they cover together."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:4], others[:, 2:4])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:4] - others[:, :2], axis=1)
    return shared / (np.prod(box[2:4] - box[:2]) + areas - shared)


def boxes(output):
    """Return the boxes of one image, best first: rows of left, top, right, bottom, score, class."""
    centre, size, scores = output[:2].T, output[2:4].T, output[4:].T
    rows = np.column_stack([centre - size / 2, centre + size / 2, scores.max(axis=1), scores.argmax(axis=1)])
    ahead = rows[rows[:, 4] >= SCORE]
    ahead = ahead[np.argsort(-ahead[:, 4], kind="stable")]
    kept = []
    while len(ahead):
        best, ahead = ahead[0], ahead[1:]
        kept.append(best)
        ahead = ahead[(ahead[:, 5] != best[5]) | (iou(best, ahead) < OVERLAP)]
    return np.array(kept).reshape(-1, 6)


def matched(outputs, labels):
    """Return twice the pairs of boxes, divided by the boxes of both: 1.0 where all boxes are found again.

    A pair has one class and an IoU of `MATCH` or more. `labels` holds what the float model puts out.
    """
    [found] = outputs.values()
    pairs = total = 0
    for output, label in zip(found, labels, strict=True):
        own, wanted = boxes(output), boxes(label)
        total += len(own) + len(wanted)
        for box in own:
            fits = (wanted[:, 5] == box[5]) & (iou(box, wanted) >= MATCH)
            if fits.any():
                pairs += 1
                wanted = np.delete(wanted, fits.argmax(), axis=0)
    return 2 * pairs / total if total else 1.0


def crops(n, seed, size=320):
    """Return parts of a photograph that comes with matplotlib, (n, 3, size, size), in [0, 1]."""
    photo = matplotlib.image.imread(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    rng = np.random.default_rng(seed)
    places = rng.integers(0, np.array(photo.shape[:2]) - size + 1, (n, 2))
    parts = [photo[y : y + size, x : x + size] for y, x in places]
    return np.stack(parts).transpose(0, 3, 1, 2).astype(np.float32) / 255


def data(model, n=64):
    """Return n images to calibrate on, n others to judge by, and what the float model puts out for these."""
    calibration, images = (crops(n, seed) for seed in (0, 1))
    session = onnxruntime.InferenceSession(model)
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: image})[0] for image in images[:, None]]
    return calibration, images, np.concatenate(found)


if __name__ == "__main__":
    calibration, images, found = data(sys.argv[1])
    np.savez("c.npz", images=calibration)
    np.savez("t.npz", images=images, labels=found)
