// The work of a GPU thread for each pixel, in threads on the CPU; tests/test_regions.py compiles this and compares.
#include <thread>
#include <vector>

// other threads run between the reading of links and the writing of one, as they do where there are thousands
#define __atomic_store_n(...) (std::this_thread::yield(), __atomic_store_n(__VA_ARGS__))
#include "../csrc/regions.h"

using namespace trace_fast;

// Calls body(i) for every i below count in threads, each of which takes every threads-th one.
template <typename Body>
void for_each(int64_t count, int32_t threads, Body body) {
  std::vector<std::thread> running;
  for (int32_t thread = 0; thread < threads; ++thread)
    running.emplace_back([=] {
      for (int64_t i = thread; i < count; i += threads) body(i);
    });
  for (std::thread& thread : running) thread.join();
}

// Writes the root of each item of a forest over its parent, (count).
extern "C" void flatten(int32_t* roots, int32_t count, int32_t threads) {
  for_each(count, threads, [=](int64_t i) { link_to_root(roots, static_cast<int32_t>(i)); });
}

// Writes the first pixel of the region of each pixel, from pixels in any order: order, roots (height * width).
extern "C" void label(const uint8_t* barrier, const int32_t* order, int32_t height, int32_t width, bool diagonal,
                      int32_t threads, int32_t* roots) {
  const int32_t pixels = height * width;
  for (int32_t i = 0; i < pixels; ++i) roots[i] = i;
  for_each(pixels, threads, [=](int64_t i) { unite_pixel(roots, barrier, order[i], width, diagonal); });
  flatten(roots, pixels, threads);
}

// Writes the pixel to which each of eight steps leads from each pixel, (height * width, 8).
extern "C" void neighbors(int32_t height, int32_t width, int32_t* there) {
  for (int32_t i = 0; i < 8 * height * width; ++i) there[i] = next_pixel(i / 8, i % 8, height, width);
}

// Takes one step of four masks, like cuda::random_walk; affinities is scratch memory.
extern "C" void walk(const float* masks, const float* powers, const int32_t* ahead, int64_t reach, int64_t height,
                     int64_t width, int32_t threads, float* affinities, float* walked) {
  for_each(reach * height * width, threads, [=](int64_t i) {
    const int64_t step = i / (height * width), y = i / width % height;
    affinities[i] = lowest_power(powers, y, i % width, ahead[2 * step], ahead[2 * step + 1], height, width);
  });
  for_each(height * width, threads, [=](int64_t i) {
    walk_pixel<4>(affinities, ahead, reach, masks, walked, i / width, i % width, height, width);
  });
}
