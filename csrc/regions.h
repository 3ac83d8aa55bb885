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

// Unites a pixel of an image with those that touch it before it in raster order, unless it or they are on the barrier.
TRACE_FAST_SHARED void unite_pixel(int32_t* parents, const uint8_t* barrier, int32_t pixel, int32_t width,
                                   bool diagonal) {
  if (barrier[pixel]) return;
  const int32_t x = pixel % width, above = pixel - width;
  if (x > 0 && !barrier[pixel - 1]) unite(parents, pixel, pixel - 1);
  if (above < 0) return;
  if (!barrier[above]) unite(parents, pixel, above);
  if (diagonal && x > 0 && !barrier[above - 1]) unite(parents, pixel, above - 1);
  if (diagonal && x + 1 < width && !barrier[above + 1]) unite(parents, pixel, above + 1);
}

// The pixel that step 0 to 3 along an axis, or 4 to 7 along a diagonal, leads to; -1 if it leaves the image.
TRACE_FAST_SHARED int32_t next_pixel(int32_t pixel, int step, int32_t height, int32_t width) {
  const int32_t dy = step < 4 ? (step == 0 ? -1 : step == 3) : (step < 6 ? -1 : 1);
  const int32_t dx = step < 4 ? (step == 1 ? -1 : step == 2) : (step % 2 == 0 ? -1 : 1);
  const int32_t y = pixel / width + dy, x = pixel % width + dx;
  return y < 0 || y >= height || x < 0 || x >= width ? -1 : y * width + x;
}

// Whether pixel (y, x) of the rectangle from (0, 0) to (dy, dx) is on the path between these: closer than one pixel to
// the line through both.
TRACE_FAST_SHARED bool on_path(int64_t dy, int64_t dx, int64_t y, int64_t x) {
  const int64_t area = dy * x - dx * y;
  return area * area < dy * dy + dx * dx;
}

// The affinity of pixel (y, x) and the one a step (dy, dx) ahead: the lowest power on the path, 0 out of the image.
TRACE_FAST_SHARED float lowest_power(const float* powers, int64_t y, int64_t x, int64_t dy, int64_t dx, int64_t height,
                                     int64_t width) {
  if (y + dy >= height || x + dx < 0 || x + dx >= width) return 0;
  float lowest = powers[y * width + x];
  for (int64_t i = 0; i <= dy; ++i)
    for (int64_t j = dx < 0 ? dx : 0; j <= (dx < 0 ? 0 : dx); ++j)
      if (on_path(dy, dx, i, j)) {
        const float power = powers[(y + i) * width + x + j];
        if (power < lowest) lowest = power;
      }
  return lowest;
}

// What pixel (y, x) of kMasks masks becomes in a step of the walk; affinities (count, height, width) of steps ahead,
// (count, 2) of dy and dx. masks and walked start kMasks masks of pixels each.
template <int kMasks>
TRACE_FAST_SHARED void walk_pixel(const float* affinities, const int32_t* steps, int64_t count, const float* masks,
                                  float* walked, int64_t y, int64_t x, int64_t height, int64_t width) {
  const int64_t pixels = height * width, pixel = y * width + x;
  float degree = 1, sums[kMasks];
  for (int mask = 0; mask < kMasks; ++mask) sums[mask] = masks[mask * pixels + pixel];
  for (int64_t step = 0; step < count; ++step) {
    const int64_t dy = steps[2 * step], dx = steps[2 * step + 1];
    const float* const own = affinities + step * pixels + pixel;
    // ahead, and back from the other end
    for (int side = 1; side >= -1; side -= 2) {
      const int64_t below = y + side * dy, beside = x + side * dx;
      if (below < 0 || below >= height || beside < 0 || beside >= width) continue;
      const int64_t distance = side * (dy * width + dx);
      const float affinity = own[side < 0 ? distance : 0];
      degree += affinity;
      for (int mask = 0; mask < kMasks; ++mask) sums[mask] += affinity * masks[mask * pixels + pixel + distance];
    }
  }
  for (int mask = 0; mask < kMasks; ++mask) walked[mask * pixels + pixel] = sums[mask] / degree;
}

// Whether two masks with so many pixels, of which they share some, have an intersection over union above iou.
TRACE_FAST_SHARED bool overlap(int64_t shared, int64_t pixels, int64_t others, double iou) {
  return static_cast<double>(shared) > iou * static_cast<double>(pixels + others - shared);
}

}  // namespace trace_fast
