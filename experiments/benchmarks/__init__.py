"""Measure what training steps, their input and an export cost, beside FP32 and other packages."""
