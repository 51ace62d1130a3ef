"""Run `python -m qt_jax.equalize MODEL.onnx --calibration C.npz`: write the neutral form of a float graph.

`qt_jax.equalize` is a function, too. A module that is imported under its name would take its place, so this
one refuses to be imported. Its contents are in `qt_jax.equalization`.
"""

import sys

if __name__ == "__main__":
    from qt_jax.equalization.command import main

    sys.exit(main())

raise ImportError("qt_jax.equalize is a function and a command: import from qt_jax.equalization instead")
