"""Train with other quantization-aware methods at Quant-Trim's budget: LSQ, PACT and Qwix.

LSQ and PACT learn their ranges as parameters beside each kernel. They leave them in the checkpoint as
Quant-Trim's statistics, so evaluation, ranges files, QDQ and Clip export work on them unchanged.
"""
