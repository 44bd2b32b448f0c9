"""specdec: Mixture-of-Experts models larger than memory, with speculative decoding, on MLX.

Importing this package imports nothing else: rooms are imported where they are used, so that
`specdec --help` does not pay for MLX.
"""

__version__ = "0.1.0"
