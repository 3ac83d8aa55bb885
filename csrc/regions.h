// Shared by the CPU and the GPU kernels of regions: unions of pixels, steps and paths between pixels, overlap of masks.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TRACE_FAST_SHARED static __host__ __device__ inline
#else
#define TRACE_FAST_SHARED static inline
#endif

namespace trace_fast {

// Many threads read and write the links of a forest at once: each access is atomic, in no particular order.
TRACE_FAST_SHARED int32_t read_link(const int32_t* slot) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const volatile int32_t*>(slot);
#else
  return __atomic_load_n(slot, __ATOMIC_RELAXED);
#endif
}

TRACE_FAST_SHARED void write_link(int32_t* slot, int32_t value) {
#if defined(__CUDA_ARCH__)
  *static_cast<volatile int32_t*>(slot) = value;
#else
  __atomic_store_n(slot, value, __ATOMIC_RELAXED);
#endif
}

// Lowers *slot to value if value is less, and returns its old value.
TRACE_FAST_SHARED int32_t fetch_min(int32_t* slot, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicMin(slot, value);
#else
  int32_t old = read_link(slot);
  while (value < old && !__atomic_compare_exchange_n(slot, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
#endif
}

// Returns the root of item, the lowest item of its set: a parent is lower than its children, a root its own parent.
// Every item on the way is linked to its grandparent. Threads that unite sets may do so at once, since a link to an
// ancestor, however far from the root, keeps a set together.
TRACE_FAST_SHARED int32_t find_root(int32_t* parents, int32_t item) {
  for (int32_t parent = read_link(parents + item);;) {
    const int32_t grandparent = read_link(parents + parent);
    if (grandparent == parent) return parent;
    write_link(parents + item, grandparent);
    item = parent, parent = grandparent;
  }
}

// Links item to its root, once all sets are united. Many threads may call it at once, each for other items. It writes
// no other link: a shorter way to an ancestor would replace the root that another thread has just written.
TRACE_FAST_SHARED void link_to_root(int32_t* parents, int32_t item) {
  int32_t root = read_link(parents + item);
  for (int32_t parent; (parent = read_link(parents + root)) != root;) root = parent;
  write_link(parents + item, root);
}

// Unites the sets of a and b. Many threads may call it at once (Playne and Hawick, 2018).
TRACE_FAST_SHARED void unite(int32_t* parents, int32_t a, int32_t b) {
  a = find_root(parents, a);
  b = find_root(parents, b);
  while (a != b) {
    const int32_t low = a < b ? a : b, high = a < b ? b : a;
    const int32_t parent = fetch_min(parents + high, low);
    if (parent == high) return;
    // another thread has linked high to parent, which must now be united with low
    a = find_root(parents, parent);
    b = find_root(parents, low);
  }
}

// Unites a pixel with the pixels before it in raster order that touch it, unless it or they are on the barrier.
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

// Returns the pixel to which step 0 to 3 along an axis, or 4 to 7 along a diagonal, leads; -1 outside of the image.
TRACE_FAST_SHARED int32_t next_pixel(int32_t pixel, int step, int32_t height, int32_t width) {
  const int32_t dy = step < 4 ? (step == 0 ? -1 : step == 3) : (step < 6 ? -1 : 1);
  const int32_t dx = step < 4 ? (step == 1 ? -1 : step == 2) : (step % 2 == 0 ? -1 : 1);
  const int32_t y = pixel / width + dy, x = pixel % width + dx;
  return y < 0 || y >= height || x < 0 || x >= width ? -1 : y * width + x;
}

// Returns whether pixel (y, x) of the rectangle from (0, 0) to (dy, dx) is on the path between these corners: closer
// than one pixel to the line through both.
TRACE_FAST_SHARED bool on_path(int64_t dy, int64_t dx, int64_t y, int64_t x) {
  const int64_t area = dy * x - dx * y;
  return area * area < dy * dy + dx * dx;
}

// Returns the affinity of pixel (y, x) and the pixel a step (dy, dx) ahead: the lowest power on the path between them,
// or 0 if the step leaves the image.
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

// Computes pixel (y, x) of kMasks masks after a step of the walk: from masks to walked, (kMasks, height, width) each.
// affinities (count, height, width) are those of the steps ahead, whose (dy, dx) are in steps (count, 2).
template <int kMasks>
TRACE_FAST_SHARED void walk_pixel(const float* affinities, const int32_t* steps, int64_t count, const float* masks,
                                  float* walked, int64_t y, int64_t x, int64_t height, int64_t width) {
  const int64_t pixels = height * width, pixel = y * width + x;
  float degree = 1, sums[kMasks];
  for (int mask = 0; mask < kMasks; ++mask) sums[mask] = masks[mask * pixels + pixel];
  for (int64_t step = 0; step < count; ++step) {
    const int64_t dy = steps[2 * step], dx = steps[2 * step + 1];
    const float* const own = affinities + step * pixels + pixel;
    // the neighbor ahead, then the neighbor behind, whose affinity is that of the step ahead from there
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

// Returns whether two masks of these numbers of pixels, and of pixels they share, have an IoU above iou.
TRACE_FAST_SHARED bool overlap(int64_t shared, int64_t pixels, int64_t others, double iou) {
  return static_cast<double>(shared) > iou * static_cast<double>(pixels + others - shared);
}

}  // namespace trace_fast
