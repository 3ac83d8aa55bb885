// Divergence between rows of attention maps: over time (kl) and over space (abdiv), reading each map once.
//
// Columns are independent until the last sum, so a work item is a tile of columns of one image. It goes through the
// tokens in order and computes each logarithm once: those of the last two grid rows stay in a ring small enough for the
// cache, where the tokens two to the right and two below read them. Logarithms are in units of log 2 until the last
// step.
#include "../common.h"
#include "../trace_fast.h"
#include "simd.h"

namespace trace_fast {
namespace {

// wide enough for long reads, narrow enough that two rows of a 64-wide grid leave room in a 1 MiB cache
constexpr int64_t kTile = 512;
static_assert(kTile % kLanes == 0, "tiles are whole vectors");

// how many floats ahead to prefetch
constexpr int64_t kPrefetch = 1024;

// Returns the sum over a tile of p * (log_p - log_q).
inline float divergence(const float* p, const float* log_p, const float* log_q, int64_t columns) {
  vec sums = {};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) sums += load(p + j) * (load(log_p + j) - load(log_q + j));
  if (j < columns) sums += load_first(p + j, columns - j, 0.0f) * (load(log_p + j) - load(log_q + j));
  return sum(sums);
}

// Processes a tile of columns of one image: previous, current (tokens, columns of stride); ring (2, width, kTile).
// Returns the sum over tokens of KL(previous || current), and writes the abdiv of current to scores (height, width).
template <bool kKl, bool kAbdiv>
double sweep(const float* previous, const float* current, int64_t height, int64_t width, int64_t stride,
             int64_t columns, float* ring, float* scores) {
  double total = 0;
  Pace pace;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      pace.spend(columns);
      const int64_t token = y * width + x;
      const float* const p = kKl ? previous + token * stride : nullptr;
      const float* const q = current + token * stride;
      float* const row = ring + y % 2 * width * kTile;
      float* const other_row = ring + (y + 1) % 2 * width * kTile;
      float* const here = row + x * kTile;
      // the tokens two before, clamped to the grid; the logarithms of the one above are in `here` until overwritten.
      // in the first row or column there is no token between: any values of `here` are read, and the sum is not used
      const float* const left = x == 0 ? here : x == 1 ? row : here - 2 * kTile;
      const float* const above = y == 1 ? other_row + x * kTile : here;
      const int64_t ahead = kPrefetch / kTile * stride;

      vec step = {}, across = {}, down = {};
      const auto add = [&](int64_t j, vec p_j, vec q_j) {
        const vec log_q = log2(q_j);
        if (kKl) step += p_j * (log2(p_j) - log_q);
        if (kAbdiv) {
          across += q_j * (log_q - load(left + j));
          down += q_j * (log_q - load(above + j));
          store(here + j, log_q);
        }
      };
      int64_t j = 0;
      for (; j + kLanes <= columns; j += kLanes) {
        if (kKl) __builtin_prefetch(p + j + ahead);
        __builtin_prefetch(q + j + ahead);
        add(j, kKl ? load(p + j) : vec{}, load(q + j));
      }
      // lanes beyond the map hold 1 in every row, so that all their terms are 1 * (0 - 0)
      if (j < columns) add(j, kKl ? load_first(p + j, columns - j, 1.0f) : vec{}, load_first(q + j, columns - j, 1.0f));

      if (kKl) total += sum(step);
      if (kAbdiv) {
        scores[token] = 0;
        if (x > 0) scores[token - 1] += sum(across);
        if (y > 0) scores[token - width] += sum(down);
        if (x > 0 && x == width - 1) scores[token] += divergence(q, here, here - kTile, columns);
        if (y > 0 && y == height - 1) scores[token] += divergence(q, here, other_row + x * kTile, columns);
      }
    }
  }
  return total;
}

template <bool kKl, bool kAbdiv>
void divergences(const float* previous, const float* current, int64_t batch, int64_t height, int64_t width, float* kl,
                 float* abdiv, int num_threads) {
  const int64_t tokens = height * width;
  const int64_t tiles = round_up(tokens, kTile) / kTile;
  const int64_t ring = kAbdiv ? 2 * width * kTile : 0;
  const Scratch rings(num_threads * ring);
  const Scratch scores(kAbdiv ? batch * tiles * tokens : 0);
  const Scratch steps(batch * tiles * 2);
  double* const step_sums = reinterpret_cast<double*>(steps.data);

  parallel_for(batch * tiles, num_threads, [&](int64_t item, int thread) {
    const int64_t first = item % tiles * kTile;
    const int64_t columns = tokens - first < kTile ? tokens - first : kTile;
    const int64_t offset = item / tiles * tokens * tokens + first;
    step_sums[item] = sweep<kKl, kAbdiv>(kKl ? previous + offset : nullptr, current + offset, height, width, tokens,
                                         columns, rings.data + thread * ring, scores.data + item * tokens);
  });

  // these sums are in the order of the tiles, whichever threads computed them
  for (int64_t image = 0; image < batch; ++image) {
    if (kKl) {
      double total = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) total += step_sums[image * tiles + tile];
      kl[image] = static_cast<float>(kLn2 * total / tokens);
    }
    if (kAbdiv)
      for (int64_t token = 0; token < tokens; ++token) {
        double total = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) total += scores.data[(image * tiles + tile) * tokens + token];
        abdiv[image * tokens + token] = static_cast<float>(kLn2 * total);
      }
  }
}

}  // namespace

template <>
void step_kl<TRACE_FAST_ISA>(const float* previous, const float* current, int64_t batch, int64_t tokens, float* kl,
                             int num_threads) {
  divergences<true, false>(previous, current, batch, tokens, 1, kl, nullptr, num_threads);
}

template <>
void abdiv<TRACE_FAST_ISA>(const float* attention, int64_t batch, int64_t height, int64_t width, float* abdiv,
                           int num_threads) {
  divergences<false, true>(nullptr, attention, batch, height, width, nullptr, abdiv, num_threads);
}

template <>
void step_kl_abdiv<TRACE_FAST_ISA>(const float* previous, const float* current, int64_t batch, int64_t height,
                                   int64_t width, float* kl, float* abdiv, int num_threads) {
  divergences<true, true>(previous, current, batch, height, width, kl, abdiv, num_threads);
}

}  // namespace trace_fast
