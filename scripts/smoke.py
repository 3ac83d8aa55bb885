"""Find edges and masks with an installed package and none of its extras; a wheel that does is a wheel that works."""

import numpy as np

import trace_fast

photo = np.zeros((48, 64, 3), np.uint8)
photo[10:30, 20:50] = 255
masks = np.zeros((1, 48, 64), bool)
masks[0, 12:28, 22:48] = True
for stage in (1, 2):
    edges = trace_fast.edges(photo, stage=stage)
    assert edges.shape == (48, 64)
    assert edges.max() > edges.min() >= 0
assert trace_fast.propagate(masks, edges).shape == masks.shape
regions, scores = trace_fast.instances(edges)
assert len(regions) == len(scores) > 0
print(f"trace_fast {trace_fast.__version__} of {trace_fast.__file__} finds edges, fits masks and finds instances")
