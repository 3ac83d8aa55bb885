"""Every op in plain torch, on any device and in any floating dtype: the specification, and its documentation.

`trace_fast.ops` has the same functions, checked and fast; `help()` there adds the dtypes and errors of each.

"The paper" is "TRACE: Your Diffusion Model is Secretly an Instance Edge Detector" (ICLR 2026, arXiv 2503.07982).
Sizes: B batch, H heads, d channels per head, h x w token grid, N = h * w tokens; M masks, H x W pixels of an image.
Half precision is computed in float32.
"""

from trace_fast.reference import attention, contours, divergence, hierarchy, regions
from trace_fast.reference.attention import *
from trace_fast.reference.contours import *
from trace_fast.reference.divergence import *
from trace_fast.reference.hierarchy import *
from trace_fast.reference.regions import *

__all__: list[str] = []
__all__ += attention.__all__
__all__ += contours.__all__
__all__ += divergence.__all__
__all__ += hierarchy.__all__
__all__ += regions.__all__
