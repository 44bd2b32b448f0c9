"""The operations on NumPy arrays, compiled by Numba: what machines without a GPU run.

Every function has the name, shapes and meaning of the one in kernels/ that it serves. A row is
computed by the same machine code and in the same order whatever stands beside it, so results are
independent of the number of rows, bit for bit; here that holds for a prompt as well.
All floats are float32. Kernels compile at first use (once per machine: Numba keeps them on disk).
"""
