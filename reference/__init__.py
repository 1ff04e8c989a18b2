"""The NumPy model of the kernels: the same steps, names and order, bit for bit."""
