"""The CUDA C++ sources (.cu) and the files they include (.cuh), installed as package data."""
