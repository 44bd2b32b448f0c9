"""How this room compiles: Numba's njit with one set of options, cached on disk.

fastmath lets sums run in vector lanes. The lanes are fixed when a kernel is compiled and depend on
the length of a row alone, so a row's bits do not depend on the other rows. NaN and Inf keep their
meaning (no nnan, no ninf): the engine looks for them.
"""

from numba import njit

FAST = {"reassoc", "contract", "nsz", "arcp"}

jit = njit(fastmath=FAST, nogil=True, error_model="numpy", cache=True)
