"""What quantization does to each layer of a float ONNX graph, why, and what to do about it.

`layers` names the layers, `simulation` rounds any choice of them to any width.
"""
