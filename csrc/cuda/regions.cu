// Regions and masks on a GPU. The work of a thread for one pixel is in ../regions.h, which tests run on the CPU too.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../regions.h"
#include "../trace_fast.h"

namespace trace_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// the lowest major compute capability that setup.py builds for
constexpr int kOldest = 8;

// masks for which a thread computes a pixel at once, reading the affinities once
constexpr int kTogether = 4;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the current one until the end of the scope.
struct DeviceGuard {
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int before = 0;
};

cudaStream_t get_stream(const Queue& queue) { return static_cast<cudaStream_t>(queue.stream); }

// Returns the number of blocks for items of one thread each; kernels loop over the items that exceed it.
unsigned count_blocks(int64_t items) {
  return static_cast<unsigned>(std::min<int64_t>((items + kThreads - 1) / kThreads, int64_t{1} << 20));
}

// Returns the number of rows of blocks for groups; kernels loop over the groups that exceed what a grid may have.
unsigned count_rows(int64_t groups) { return static_cast<unsigned>(std::min<int64_t>(groups, 65535)); }

__device__ int64_t first_item() { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }
__device__ int64_t item_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__global__ void start_roots(int32_t* roots, int64_t pixels) {
  for (int64_t i = first_item(); i < pixels; i += item_stride()) roots[i] = static_cast<int32_t>(i);
}

__global__ void unite_pixels(const uint8_t* barrier, int64_t pixels, int32_t width, bool diagonal, int32_t* roots) {
  for (int64_t i = first_item(); i < pixels; i += item_stride())
    unite_pixel(roots, barrier, static_cast<int32_t>(i), width, diagonal);
}

__global__ void flatten(int32_t* roots, int64_t pixels) {
  for (int64_t i = first_item(); i < pixels; i += item_stride()) link_to_root(roots, static_cast<int32_t>(i));
}

// The order of labels at a pixel: the lower distance comes first, then the lower label.
constexpr unsigned long long kFar = ~0ull;
__device__ unsigned long long make_key(int64_t distance, int32_t label) {
  return static_cast<unsigned long long>(distance) << 32 | static_cast<uint32_t>(label);
}

// Grows the labels above 0 over the ground, the pixels whose barrier has the value `ground`, one distance at a time,
// after each of which all blocks synchronize. fronts holds the pixels at two successive distances, sizes their numbers
// at three. Labels that are not on the ground grow only if `everywhere`; seeds on the barrier do not.
__global__ void grow(const int32_t* from, const uint8_t* barrier, bool ground, bool everywhere, int32_t height,
                     int32_t width, int steps, unsigned long long* keys, int32_t* fronts, int32_t* sizes,
                     int32_t* labels) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int64_t pixels = static_cast<int64_t>(height) * width;
  if (first_item() < 3) sizes[first_item()] = 0;
  grid.sync();
  for (int64_t i = first_item(); i < pixels; i += item_stride()) {
    const bool labeled = from[i] > 0 && (everywhere || (barrier[i] != 0) == ground);
    keys[i] = labeled ? make_key(0, from[i]) : kFar;
    if (labeled) fronts[atomicAdd(sizes, 1)] = static_cast<int32_t>(i);
  }
  grid.sync();
  for (int64_t distance = 0;; ++distance) {
    const int32_t* const front = fronts + distance % 2 * pixels;
    int32_t* const next = fronts + (distance + 1) % 2 * pixels;
    const int32_t size = sizes[distance % 3];
    if (size == 0) break;
    if (first_item() == 0) sizes[(distance + 2) % 3] = 0;
    for (int64_t i = first_item(); i < size; i += item_stride()) {
      const int32_t label = static_cast<int32_t>(keys[front[i]]);
      for (int step = 0; step < steps; ++step) {
        const int32_t there = next_pixel(front[i], step, height, width);
        if (there < 0 || (barrier[there] != 0) != ground) continue;
        // the first thread to reach the pixel adds it to the front; the lowest label stays
        if (atomicMin(keys + there, make_key(distance + 1, label)) == kFar)
          next[atomicAdd(sizes + (distance + 1) % 3, 1)] = there;
      }
    }
    grid.sync();
  }
  for (int64_t i = first_item(); i < pixels; i += item_stride())
    labels[i] = keys[i] == kFar ? 0 : static_cast<int32_t>(keys[i]);
}

__global__ void connect(const float* powers, const int32_t* ahead, int64_t reach, int64_t height, int64_t width,
                        float* affinities) {
  const int64_t pixels = height * width;
  for (int64_t i = first_item(); i < reach * pixels; i += item_stride()) {
    const int64_t step = i / pixels, pixel = i % pixels;
    affinities[i] =
        lowest_power(powers, pixel / width, pixel % width, ahead[2 * step], ahead[2 * step + 1], height, width);
  }
}

template <int kMasks>
__global__ void walk(const float* affinities, const int32_t* ahead, int64_t reach, const float* masks, float* walked,
                     int64_t groups, int64_t height, int64_t width) {
  const int64_t pixels = height * width;
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y)
    for (int64_t i = first_item(); i < pixels; i += item_stride()) {
      const int64_t first = group * kMasks * pixels;
      walk_pixel<kMasks>(affinities, ahead, reach, masks + first, walked + first, i / width, i % width, height, width);
    }
}

// Packs masks into bits: each word is the vote of a warp.
__global__ void pack(const uint8_t* masks, int64_t count, int64_t pixels, int64_t words, uint32_t* bits) {
  const int64_t lane = threadIdx.x % 32;
  for (int64_t word = first_item() / 32; word < count * words; word += item_stride() / 32) {
    const int64_t mask = word / words, pixel = word % words * 32 + lane;
    const uint32_t votes = __ballot_sync(~0u, pixel < pixels && masks[mask * pixels + pixel] != 0);
    if (lane == 0) bits[word] = votes;
  }
}

// Counts the pixels that two masks share: one warp per pair of masks.
__global__ void count_shared(const uint32_t* bits, int64_t count, int64_t words, int32_t* shared) {
  const int64_t lane = threadIdx.x % 32;
  for (int64_t pair = first_item() / 32; pair < count * count; pair += item_stride() / 32) {
    const int64_t mask = pair / count, other = pair % count;
    if (other < mask) continue;
    int32_t sum = 0;
    for (int64_t word = lane; word < words; word += 32)
      sum += __popc(bits[mask * words + word] & bits[other * words + word]);
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) shared[pair] = shared[other * count + mask] = sum;
  }
}

__global__ void unite_bytes(const uint8_t* masks, const int64_t* groups, int64_t count, int64_t pixels,
                            uint8_t* merged) {
  for (int64_t i = first_item(); i < pixels; i += item_stride())
    for (int64_t mask = 0; mask < count; ++mask)
      if (masks[mask * pixels + i]) merged[groups[mask] * pixels + i] = 1;
}

}  // namespace

bool is_available() {
  // an error means that there is no driver or no GPU, or that the driver is older than this runtime
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) return false;
  for (int device = 0; device < devices; ++device) {
    int major = 0, cooperative = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
    if (major < kOldest || !cooperative) return false;
  }
  return devices > 0;
}

void label_roots(const uint8_t* barrier, int64_t batch, int64_t height, int64_t width, bool diagonal, int32_t* roots,
                 Queue queue) {
  const DeviceGuard guard(queue.device);
  const int64_t pixels = height * width;
  for (int64_t image = 0; image < batch; ++image) {
    int32_t* const own = roots + image * pixels;
    const unsigned blocks = count_blocks(pixels);
    start_roots<<<blocks, kThreads, 0, get_stream(queue)>>>(own, pixels);
    unite_pixels<<<blocks, kThreads, 0, get_stream(queue)>>>(barrier + image * pixels, pixels,
                                                             static_cast<int32_t>(width), diagonal, own);
    flatten<<<blocks, kThreads, 0, get_stream(queue)>>>(own, pixels);
  }
  check(cudaGetLastError());
}

void flood_fill(const int32_t* seeds, const uint8_t* barrier, int64_t batch, int64_t height, int64_t width,
                bool diagonal, bool claim_barrier, int32_t* labels, uint64_t* keys, int32_t* fronts, int32_t* sizes,
                Queue queue) {
  const DeviceGuard guard(queue.device);
  int processors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, queue.device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, grow, kThreads, 0));
  const int64_t pixels = height * width;
  const unsigned blocks = std::min(count_blocks(pixels), static_cast<unsigned>(processors * resident));
  for (int64_t image = 0; image < batch; ++image)
    for (int phase = 0; phase <= claim_barrier; ++phase) {
      int32_t* to = labels + image * pixels;
      const int32_t* from = phase == 0 ? seeds + image * pixels : to;
      const uint8_t* walls = barrier + image * pixels;
      bool ground = phase == 1, everywhere = phase == 1;
      int32_t rows = static_cast<int32_t>(height), columns = static_cast<int32_t>(width);
      int steps = diagonal ? 8 : 4;
      void* arguments[] = {&from, &walls, &ground, &everywhere, &rows, &columns, &steps, &keys, &fronts, &sizes, &to};
      check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grow), dim3(blocks), dim3(kThreads), arguments, 0,
                                        get_stream(queue)));
    }
}

void random_walk(float* masks, float* others, const float* powers, const int32_t* ahead, int64_t reach, int64_t count,
                 int64_t height, int64_t width, int64_t steps, float* affinities, Queue queue) {
  const DeviceGuard guard(queue.device);
  const int64_t pixels = height * width;
  if (reach > 0)
    connect<<<count_blocks(reach * pixels), kThreads, 0, get_stream(queue)>>>(powers, ahead, reach, height, width,
                                                                              affinities);
  const int64_t whole = count / kTogether, rest = count - whole * kTogether, first = whole * kTogether * pixels;
  for (int64_t step = 0; step < steps; ++step) {
    const float* const from = step % 2 == 0 ? masks : others;
    float* const to = step % 2 == 0 ? others : masks;
    if (whole > 0)
      walk<kTogether><<<dim3(count_blocks(pixels), count_rows(whole)), kThreads, 0, get_stream(queue)>>>(
          affinities, ahead, reach, from, to, whole, height, width);
    if (rest > 0)
      walk<1><<<dim3(count_blocks(pixels), count_rows(rest)), kThreads, 0, get_stream(queue)>>>(
          affinities, ahead, reach, from + first, to + first, rest, height, width);
  }
  check(cudaGetLastError());
}

void shared_pixels(const uint8_t* masks, int64_t count, int64_t pixels, uint32_t* words, int32_t* shared, Queue queue) {
  if (count == 0) return;
  const DeviceGuard guard(queue.device);
  const int64_t row = (pixels + 31) / 32;
  pack<<<count_blocks(32 * count * row), kThreads, 0, get_stream(queue)>>>(masks, count, pixels, row, words);
  count_shared<<<count_blocks(32 * count * count), kThreads, 0, get_stream(queue)>>>(words, count, row, shared);
  check(cudaGetLastError());
}

void unite_masks(const uint8_t* masks, const int64_t* groups, int64_t count, int64_t pixels, uint8_t* merged,
                 Queue queue) {
  const DeviceGuard guard(queue.device);
  unite_bytes<<<count_blocks(pixels), kThreads, 0, get_stream(queue)>>>(masks, groups, count, pixels, merged);
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace trace_fast
