"""Other quantization-aware training at Quant-Trim's budget: LSQ, PACT and Qwix.

LSQ and PACT learn their ranges as parameters beside each kernel, and leave them in the checkpoint as
Quant-Trim's statistics, so that evaluation, ranges files, QDQ and Clip export serve them unchanged.
"""
