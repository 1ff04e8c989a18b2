"""Validators that run on a GPU: the NumPy model against the hardware, bit for bit."""
