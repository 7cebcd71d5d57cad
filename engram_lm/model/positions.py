"""Documents packed into rows, as a decoder is told of them: positions that begin again.

Shapes: B rows, T tokens.
"""

import numpy as np
import numpy.typing as npt


def packed_positions(starts_BT: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """`position_ids` (B, T): 0 where a document starts and in the first column, then upwards."""
    columns_T = np.arange(starts_BT.shape[1])
    begins_BT = np.maximum.accumulate(np.where(starts_BT, columns_T, 0), axis=1)
    return columns_T - begins_BT
