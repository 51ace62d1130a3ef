"""The networks of a run: how their methods are called, and their files."""

QUANT_TRIM, FLOAT = "quant-trim", "float"
ONNX_NAMES = {QUANT_TRIM: "model.onnx", FLOAT: "twin.onnx"}


def graphs_of(quantizer: str) -> dict[str, str]:
    """Method -> name of its graph in the folder of a run with this `--quantizer`.

    >>> graphs_of("lsq")
    {'lsq': 'model.onnx', 'float': 'twin.onnx'}
    """
    return {quantizer: ONNX_NAMES[QUANT_TRIM], FLOAT: ONNX_NAMES[FLOAT]}
