"""Types of the numpy arrays that the packages exchange, and the most experts that they can hold."""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

MOST_EXPERTS = 2**15 - 1
"""Most experts of a layer: routes are 16-bit numbers."""
