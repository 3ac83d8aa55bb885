// Runs the bodies of the GPU kernels in many threads, for `make sanitize-threads`: a program apart, so that the
// sanitizer sees nothing else. It exits with 1 if a result is not that of one thread.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>

#include "regions_bodies.cpp"

namespace {

constexpr int32_t kThreads = 16, kTrials = 3;

// A chain, in which every item is the parent of the next, is the forest on which threads meet most often.
bool check_chain(int32_t count) {
  std::vector<int32_t> roots(count);
  for (int32_t i = 0; i < count; ++i) roots[i] = std::max(i - 1, 0);
  flatten(roots.data(), count, kThreads);
  return std::count(roots.begin(), roots.end(), 0) == count;
}

// Labels are those of one thread, whatever the order in which pixels come.
bool check_labels(const std::vector<uint8_t>& barrier, int32_t height, int32_t width, std::mt19937& random) {
  std::vector<int32_t> order(height * width), expected(order.size()), roots(order.size());
  std::iota(order.begin(), order.end(), 0);
  for (const bool diagonal : {false, true}) {
    label(barrier.data(), order.data(), height, width, diagonal, 1, expected.data());
    std::shuffle(order.begin(), order.end(), random);
    label(barrier.data(), order.data(), height, width, diagonal, kThreads, roots.data());
    if (roots != expected) return false;
  }
  return true;
}

// A corridor that runs to and fro through the image: its rows are joined at alternate ends.
std::vector<uint8_t> make_corridor(int32_t height, int32_t width) {
  std::vector<uint8_t> barrier(height * width);
  for (int32_t y = 1; y < height; y += 2)
    for (int32_t x = 0; x < width; ++x) barrier[y * width + x] = x != (y % 4 == 1 ? width - 1 : 0);
  return barrier;
}

std::vector<uint8_t> make_noise(int32_t height, int32_t width, std::mt19937& random) {
  std::vector<uint8_t> barrier(height * width);
  for (uint8_t& pixel : barrier) pixel = random() % 5 < 2;
  return barrier;
}

bool check_walk(int32_t height, int32_t width, std::mt19937& random) {
  const std::vector<int32_t> ahead = {0, 1, 1, 0, 1, -1, 2, 1};
  const int64_t pixels = height * width, reach = ahead.size() / 2;
  std::vector<float> masks(4 * pixels), powers(pixels), affinities(reach * pixels), walked(4 * pixels), expected;
  for (float& value : masks) value = random() / 4294967296.0f;
  for (float& value : powers) value = random() / 4294967296.0f;
  for (const int32_t threads : {1, kThreads}) {
    expected = walked;
    walk(masks.data(), powers.data(), ahead.data(), reach, height, width, threads, affinities.data(), walked.data());
  }
  return walked == expected;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int32_t trial = 0; trial < kTrials; ++trial) {
    const bool right[] = {
        check_chain(65536),
        check_labels(std::vector<uint8_t>(4096), 4096, 1, random),
        check_labels(std::vector<uint8_t>(4096), 1, 4096, random),
        check_labels(make_corridor(63, 97), 63, 97, random),
        check_labels(make_noise(63, 97, random), 63, 97, random),
        check_walk(17, 23, random),
    };
    for (const bool& one : right)
      if (!one) {
        std::printf("trial %d: check %d of %d differs from one thread\n", trial, int(&one - right) + 1, 6);
        return 1;
      }
  }
}
