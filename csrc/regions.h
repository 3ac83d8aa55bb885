// What the CPU and the GPU kernels of regions have in common: when things belong together.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TRACE_FAST_SHARED static __host__ __device__ inline
#else
#define TRACE_FAST_SHARED static inline
#endif

namespace trace_fast {

// Lowers *slot to value if that is less, atomically on a GPU; what it held before.
TRACE_FAST_SHARED int32_t fetch_min(int32_t* slot, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicMin(slot, value);
#else
  const int32_t held = *slot;
  if (value < held) *slot = value;
  return held;
#endif
}

// The root of item, which is the lowest of its set: parents are lower than their children, roots their own parents.
// Every item on the way is moved to its grandparent; threads that do so at once write ancestors, whatever the order.
TRACE_FAST_SHARED int32_t find_root(int32_t* parents, int32_t item) {
  for (int32_t parent = parents[item];;) {
    const int32_t grandparent = parents[parent];
    if (grandparent == parent) return parent;
    parents[item] = grandparent;
    item = parent, parent = grandparent;
  }
}

// Makes one set of those of a and b. Many threads may call it at once (Playne and Hawick, 2018).
TRACE_FAST_SHARED void unite(int32_t* parents, int32_t a, int32_t b) {
  a = find_root(parents, a);
  b = find_root(parents, b);
  while (a != b) {
    const int32_t low = a < b ? a : b, high = a < b ? b : a;
    const int32_t held = fetch_min(parents + high, low);
    if (held == high) return;
    // another thread has moved high below held, which is to meet low in its turn
    a = find_root(parents, held);
    b = find_root(parents, low);
  }
}

// Whether pixel (y, x) of the rectangle from (0, 0) to (dy, dx) is on the path between these: closer than one pixel to
// the line through both.
TRACE_FAST_SHARED bool on_path(int64_t dy, int64_t dx, int64_t y, int64_t x) {
  const int64_t area = dy * x - dx * y;
  return area * area < dy * dy + dx * dx;
}

// Whether two masks with so many pixels, of which they share some, have an intersection over union above iou.
TRACE_FAST_SHARED bool overlap(int64_t shared, int64_t pixels, int64_t others, double iou) {
  return static_cast<double>(shared) > iou * static_cast<double>(pixels + others - shared);
}

}  // namespace trace_fast
