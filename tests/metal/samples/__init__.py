"""Small kernels that show how the shim, and the writing of kernels, are meant."""

from pathlib import Path

from specdec.kernels.gpu.kernel import MetalKernel

HERE = Path(__file__).parent

ROW_SUM = MetalKernel("row_sum", ("x", "columns"), ("out",), ("T", "THREADS"), folder=HERE)
RMS_NORM = MetalKernel(
    "rms_norm", ("x", "weight", "eps"), ("out",), ("T",), ("square.h",), folder=HERE
)
WORDS = MetalKernel("words", ("x",), ("out",), folder=HERE)
