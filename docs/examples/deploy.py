"""Export the checkpoints to ONNX and take them through ONNX Runtime's quantizers.

The files that the command line needs are written too: the graphs, calibration.npz and test.npz.
"""

import numpy as np
import onnx
import qt_jax as qt
from digits import Net, data
from flax import serialization

(images, labels), (test_images, test_labels) = data()
calibration, test_images = (x.transpose(0, 3, 1, 2) for x in (images[:256], test_images))  # channels first
np.savez("calibration.npz", images=calibration)
np.savez("test.npz", images=test_images, labels=test_labels)

for name in ("float", "fine_tuned", "quant_trimmed"):
    with open(f"{name}.msgpack", "rb") as file:
        variables = serialization.msgpack_restore(file.read())
    graph = qt.to_onnx(Net().apply, variables, (8, 8, 1))
    onnx.save(graph, f"{name}.onnx")
    records = qt.evaluate(
        graph,
        calibration,
        (test_images, test_labels),
        backends="onnxruntime",
        schemes=("int8-pc-minmax", "int8-pt-minmax", "int4w-pc-minmax", "int4w-pt-minmax"),
        runtimes=("reference",),
    )
    for record in records:
        fidelity = "" if record["sqnr_db"] is None else f"  {record['sqnr_db']:.1f} dB"
        print(f"{name:15}{record['scheme']:18}{100 * record['top1']:.1f} %{fidelity}")
