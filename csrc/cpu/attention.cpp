// Head-mean attention, accumulated in place.
//
// A work item is a block of query rows. For each head its logits come from a register-tiled product with the packed
// keys, stay in cache through max, exp and sum, and are added to total. Logits are in units of log 2.
#include "../common.h"
#include "../trace_fast.h"
#include "simd.h"

namespace trace_fast {
namespace {

// a register tile holds kTileRows x kTileVecs sums; its operands take the remaining vector registers
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 6, kTileVecs = 4;
#else
constexpr int64_t kTileRows = 6, kTileVecs = 2;
#endif
constexpr int64_t kTileColumns = kTileVecs * kLanes;
constexpr int64_t kBlockRows = 2 * kTileRows;

// packed (tokens / kTileColumns, channels, kTileColumns) = transposed panels of key (tokens, channels), zero-padded.
void pack_panel(const float* key, int64_t tokens, int64_t channels, int64_t panel, float* packed) {
  const int64_t first = panel * kTileColumns;
  packed += first * channels;
  for (int64_t j = 0; j < kTileColumns; ++j) {
    const float* row = key + (first + j) * channels;
    for (int64_t c = 0; c < channels; ++c) packed[c * kTileColumns + j] = first + j < tokens ? row[c] : 0.0f;
  }
}

// packed (kBlockRows / kTileRows, channels, kTileRows) = factor * query (rows, channels), zero-padded.
void pack_queries(const float* query, int64_t rows, int64_t channels, float factor, float* packed) {
  for (int64_t r = 0; r < kBlockRows; ++r) {
    float* column = packed + r / kTileRows * kTileRows * channels + r % kTileRows;
    for (int64_t c = 0; c < channels; ++c) column[c * kTileRows] = r < rows ? factor * query[r * channels + c] : 0.0f;
  }
}

// logits (kTileRows, kTileColumns of stride) = query (channels, kTileRows)^T key (channels, kTileColumns).
inline void multiply_tile(const float* query, const float* key, int64_t channels, float* logits, int64_t stride) {
  vec sums[kTileRows][kTileVecs] = {};
  for (int64_t c = 0; c < channels; ++c, query += kTileRows, key += kTileColumns) {
    vec keys[kTileVecs];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVecs; ++v) keys[v] = load(key + v * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int64_t v = 0; v < kTileVecs; ++v) sums[r][v] += query[r] * keys[v];
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVecs; ++v) store(logits + r * stride + v * kLanes, sums[r][v]);
}

// total (tokens) += weight * softmax of logits (tokens), which is overwritten up to the next whole tile.
// A tile at a time, so that the maxima and sums of its vectors do not wait for one another.
inline void add_softmax(float* logits, int64_t tokens, float weight, float* total) {
  const int64_t columns = round_up(tokens, kTileColumns);
  for (int64_t j = tokens; j < columns; ++j) logits[j] = -kInfinity;
  vec tops[kTileVecs];
  for (vec& top : tops) top = splat(-kInfinity);
  for (int64_t j = 0; j < columns; j += kTileColumns)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVecs; ++v) tops[v] = max(load(logits + j + v * kLanes), tops[v]);
  for (int64_t v = 1; v < kTileVecs; ++v) tops[0] = max(tops[v], tops[0]);
  const float shift = max(tops[0]);
  vec sums[kTileVecs] = {};
  for (int64_t j = 0; j < columns; j += kTileColumns)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVecs; ++v) {
      const vec mass = exp2(load(logits + j + v * kLanes) - shift);
      store(logits + j + v * kLanes, mass);
      sums[v] += mass;
    }
  for (int64_t v = 1; v < kTileVecs; ++v) sums[0] += sums[v];
  const float factor = weight / sum(sums[0]);
  int64_t j = 0;
  for (; j + kLanes <= tokens; j += kLanes) store(total + j, load(total + j) + factor * load(logits + j));
  for (; j < tokens; ++j) total[j] += factor * logits[j];
}

}  // namespace

template <>
void accumulate_attention<TRACE_FAST_ISA>(float* total, const float* query, const float* key, int64_t batch,
                                          int64_t heads, int64_t tokens, int64_t channels, float weight, float scale,
                                          int num_threads) {
  const int64_t columns = round_up(tokens, kTileColumns);
  const int64_t panels = columns / kTileColumns;
  const int64_t blocks = round_up(tokens, kBlockRows) / kBlockRows;
  const Scratch packed_keys(batch * heads * columns * channels);
  const Scratch packed_queries(num_threads * kBlockRows * channels);
  const Scratch logits(num_threads * kBlockRows * columns);

  parallel_for(batch * heads * panels, num_threads, [&](int64_t item, int) {
    const int64_t map = item / panels;
    pack_panel(key + map * tokens * channels, tokens, channels, item % panels,
               packed_keys.data + map * columns * channels);
  });

  parallel_for(batch * blocks, num_threads, [&](int64_t item, int thread) {
    const int64_t image = item / blocks;
    const int64_t first = item % blocks * kBlockRows;
    const int64_t rows = tokens - first < kBlockRows ? tokens - first : kBlockRows;
    float* const block_queries = packed_queries.data + thread * kBlockRows * channels;
    float* const block_logits = logits.data + thread * kBlockRows * columns;
    for (int64_t map = image * heads; map < (image + 1) * heads; ++map) {
      pack_queries(query + (map * tokens + first) * channels, rows, channels, scale * kLog2E, block_queries);
      for (int64_t j = 0; j < columns; j += kTileColumns)
        for (int64_t r = 0; r < rows; r += kTileRows)
          multiply_tile(block_queries + r * channels, packed_keys.data + (map * columns + j) * channels, channels,
                        block_logits + r * columns + j, columns);
      for (int64_t r = 0; r < rows; ++r)
        add_softmax(block_logits + r * columns, tokens, weight / heads,
                    total + (image * tokens + first + r) * tokens);
    }
  });
}

}  // namespace trace_fast
