// The work of a GPU thread for each pixel, in loops on the CPU; tests/test_regions.py compiles this and compares.
#include "../csrc/regions.h"

using namespace trace_fast;

// Writes the first pixel of the region of each pixel, from pixels in any order: order, roots (height * width).
extern "C" void label(const uint8_t* barrier, const int32_t* order, int32_t height, int32_t width, bool diagonal,
                      int32_t* roots) {
  const int32_t pixels = height * width;
  for (int32_t i = 0; i < pixels; ++i) roots[i] = i;
  for (int32_t i = 0; i < pixels; ++i) unite_pixel(roots, barrier, order[i], width, diagonal);
  for (int32_t i = 0; i < pixels; ++i) roots[i] = find_root(roots, i);
}

// Writes the pixel to which each of eight steps leads from each pixel, (height * width, 8).
extern "C" void neighbors(int32_t height, int32_t width, int32_t* there) {
  for (int32_t i = 0; i < 8 * height * width; ++i) there[i] = next_pixel(i / 8, i % 8, height, width);
}

// Takes one step of four masks, like cuda::random_walk; affinities is scratch memory.
extern "C" void walk(const float* masks, const float* powers, const int32_t* ahead, int64_t reach, int64_t height,
                     int64_t width, float* affinities, float* walked) {
  for (int64_t i = 0; i < reach * height * width; ++i) {
    const int64_t step = i / (height * width), y = i / width % height;
    affinities[i] = lowest_power(powers, y, i % width, ahead[2 * step], ahead[2 * step + 1], height, width);
  }
  for (int64_t i = 0; i < height * width; ++i)
    walk_pixel<4>(affinities, ahead, reach, masks, walked, i / width, i % width, height, width);
}
