"""The ops of `trace_fast.reference`, checked, fast and registered with torch; `trace_fast.backends()` shows what runs.

An op is declared once, by `register` in one of the modules below.
"""

from trace_fast import reference
from trace_fast.ops.attention import *
from trace_fast.ops.contours import *
from trace_fast.ops.divergence import *
from trace_fast.ops.hierarchy import *
from trace_fast.ops.regions import *

__all__ = reference.__all__
