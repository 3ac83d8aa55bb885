// Attention: maps averaged over heads or resampled to a finer grid, and readouts that never form the map.
//
// The keys are packed into panels as wide as a register tile, and all vectors run along them: a register-tiled product
// with the panels gives the logits of a block of query rows, which stay in cache through max, exp, sum and their use.
#include "../common.h"
#include "../trace_fast.h"
#include "simd.h"

namespace trace_fast {
namespace {

// a register tile holds kTileRows x kTileVecs sums, or kTileRows x kTileDots sums whose lanes are not yet added up; the
// operands take the remaining vector registers
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 6, kTileVecs = 4, kTileDots = 3;
#else
constexpr int64_t kTileRows = 6, kTileVecs = 2, kTileDots = 2;
#endif
constexpr int64_t kTileColumns = kTileVecs * kLanes;
constexpr int64_t kBlockRows = 2 * kTileRows;

// keys between two updates of sums in memory: a block of rows of logits for them fits a first-level cache
constexpr int64_t kChunk = 512;
static_assert(kChunk % kTileColumns == 0 && kTileRows % kTileDots == 0, "chunks are whole panels, tiles whole dots");

// the maximum of no logits: finite, so that its difference from any logit is a number or -infinity
constexpr float kLowest = -0x1.fffffep127f;

// fine keys that accumulate_resized processes at once
constexpr int64_t kStrip = 256;

// packed (tokens / kTileColumns, channels, kTileColumns) = transposed panels of rows (tokens, channels), zero-padded.
void pack_panel(const float* rows, int64_t tokens, int64_t channels, int64_t panel, float* packed) {
  const int64_t first = panel * kTileColumns;
  packed += first * channels;
  for (int64_t j = 0; j < kTileColumns; ++j) {
    const float* row = rows + (first + j) * channels;
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

// out (kTileRows, kVecs vectors) = left (kTileRows, depth) right (depth, kVecs vectors), or += where kAdd: a sum is
// added as a whole, so that rounding grows with the depth of a call alone.
// The strides of left are those of a row and of a step in depth; the others are those of a row.
template <bool kAdd, int64_t kVecs = kTileVecs>
inline void multiply_tile(const float* left, int64_t left_row, int64_t left_depth, const float* right,
                          int64_t right_stride, int64_t depth, float* out, int64_t out_stride) {
  vec sums[kTileRows][kVecs] = {};
  for (int64_t c = 0; c < depth; ++c, left += left_depth, right += right_stride) {
    vec columns[kVecs];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVecs; ++v) columns[v] = load(right + v * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVecs; ++v) sums[r][v] += left[r * left_row] * columns[v];
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVecs; ++v) {
      float* const to = out + r * out_stride + v * kLanes;
      store(to, kAdd ? load(to) + sums[r][v] : sums[r][v]);
    }
}

// out (rows, columns of stride) = packed queries (rows, channels) times packed keys (columns, channels)^T.
inline void multiply_block(const float* queries, const float* keys, int64_t channels, int64_t rows, int64_t columns,
                           float* out, int64_t stride) {
  for (int64_t j = 0; j < columns; j += kTileColumns)
    for (int64_t r = 0; r < rows; r += kTileRows)
      multiply_tile<false>(queries + r * channels, 1, kTileRows, keys + j * channels, kTileColumns, channels,
                           out + r * stride + j, stride);
}

// out (rows, width) += masses (rows, columns of stride) times values (columns, width), from vector c on; width is whole
// vectors.
template <int64_t kVecs = kTileVecs>
inline void add_products(const float* masses, int64_t stride, const float* values, int64_t columns, int64_t width,
                         int64_t rows, float* out, int64_t c = 0) {
  for (; c + kVecs * kLanes <= width; c += kVecs * kLanes)
    for (int64_t r = 0; r < rows; r += kTileRows)
      multiply_tile<true, kVecs>(masses + r * stride, stride, 1, values + c, width, columns, out + r * width + c,
                                 width);
  if constexpr (kVecs > 1) add_products<kVecs - 1>(masses, stride, values, columns, width, rows, out, c);
}

// sums (kTileRows, kTileDots of sums_stride, kLanes) += left (kTileRows, columns) times kTileDots channels of packed
// (columns, channels), from first on. Lanes are not added up; beyond the last channel, the last is repeated.
inline void multiply_dots(const float* left, int64_t left_stride, const float* packed, int64_t channels, int64_t first,
                          int64_t columns, float* sums, int64_t sums_stride) {
  int64_t offsets[kTileDots];
  for (int64_t c = 0; c < kTileDots; ++c) offsets[c] = (first + c < channels ? first + c : channels - 1) * kTileColumns;
  vec dots[kTileRows][kTileDots];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int64_t c = 0; c < kTileDots; ++c) dots[r][c] = load(sums + r * sums_stride + c * kLanes);
  for (int64_t j = 0; j < columns; j += kTileColumns, packed += channels * kTileColumns)
    for (int64_t v = 0; v < kTileColumns; v += kLanes) {
      vec rights[kTileDots];
#pragma GCC unroll 8
      for (int64_t c = 0; c < kTileDots; ++c) rights[c] = load(packed + offsets[c] + v);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kTileRows; ++r) {
        const vec row = load(left + r * left_stride + j + v);
        // keeps the row in its register: GCC would load it again for each product, more than the load ports can serve
        __atomic_signal_fence(__ATOMIC_ACQUIRE);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kTileDots; ++c) dots[r][c] += row * rights[c];
      }
    }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int64_t c = 0; c < kTileDots; ++c) store(sums + r * sums_stride + c * kLanes, dots[r][c]);
}

// Sets the logits from tokens on to -infinity: these keys only fill a panel (columns) and get no mass.
inline void mask_padding(float* logits, int64_t tokens, int64_t columns) {
  for (int64_t j = tokens; j < columns; ++j) logits[j] = -kInfinity;
}

// Returns the largest of logits (columns), which are whole panels.
// It takes a tile at a time, so that the maxima of its vectors are independent of each other.
inline float top_logit(const float* logits, int64_t columns) {
  vec tops[kTileVecs];
  for (vec& top : tops) top = splat(-kInfinity);
  for (int64_t j = 0; j < columns; j += kTileColumns)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVecs; ++v) tops[v] = max(load(logits + j + v * kLanes), tops[v]);
  for (int64_t v = 1; v < kTileVecs; ++v) tops[0] = max(tops[v], tops[0]);
  return max(tops[0]);
}

// logits (columns) = exp(logits - shift), whole panels; returns the sum.
inline float exponentiate(float* logits, int64_t columns, float shift) {
  vec sums[kTileVecs] = {};
  for (int64_t j = 0; j < columns; j += kTileColumns)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVecs; ++v) {
      const vec mass = exp2((load(logits + j + v * kLanes) - shift) * kLog2E);
      store(logits + j + v * kLanes, mass);
      sums[v] += mass;
    }
  for (int64_t v = 1; v < kTileVecs; ++v) sums[0] += sums[v];
  return sum(sums[0]);
}

// slopes (columns) = masses * (slopes - mean), whole panels.
inline void differentiate(const float* masses, int64_t columns, float mean, float* slopes) {
  for (int64_t j = 0; j < columns; j += kLanes) store(slopes + j, load(masses + j) * (load(slopes + j) - mean));
}

// total (tokens) += factor * masses (tokens).
inline void add_row(const float* masses, int64_t tokens, float factor, float* total) {
  int64_t j = 0;
  for (; j + kLanes <= tokens; j += kLanes) store(total + j, load(total + j) + factor * load(masses + j));
  for (; j < tokens; ++j) total[j] += factor * masses[j];
}

// rows (tokens, channels) = the panel of packed (kTileRows-padded channels, kTileColumns), transposed.
void unpack_panel(const float* packed, int64_t tokens, int64_t channels, int64_t panel, float* rows) {
  const int64_t first = panel * kTileColumns;
  for (int64_t j = 0; j < kTileColumns && first + j < tokens; ++j)
    for (int64_t c = 0; c < channels; ++c) rows[(first + j) * channels + c] = packed[c * kTileColumns + j];
}

// padded (width) = factor * row (channels), zero-padded to whole tiles.
void pad_row(const float* row, int64_t channels, float factor, float* padded, int64_t width) {
  for (int64_t c = 0; c < width; ++c) padded[c] = c < channels ? factor * row[c] : 0.0f;
}

void fill(float* values, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) values[i] = value;
}

// A point of the finer grid on one axis: the two points of the coarser grid around it, and their weights.
struct Interpolant {
  int64_t low, high;
  float from_low, from_high;
};
constexpr int64_t kInterpolantFloats = sizeof(Interpolant) / sizeof(float);

// points (target) as F.interpolate(mode="bilinear", align_corners=False) places them on an axis of size points.
// With sums (size), weights are divided by the sum of the weights of their coarse point, and these are written to sums.
void place_points(int64_t size, int64_t target, float* sums, Interpolant* points) {
  for (int64_t i = 0; i < target; ++i) {
    const double center = (i + 0.5) * size / target - 0.5;
    const double source = center > 0 ? center : 0;
    const int64_t low = static_cast<int64_t>(source);
    const float share = static_cast<float>(source - low);
    // an axis that keeps its size is copied: 0 times a neighbor is not always 0
    points[i] = {low, low + 1 < size && size != target ? low + 1 : low, 1 - share, share};
  }
  if (sums == nullptr) return;
  fill(sums, size, 0);
  for (int64_t i = 0; i < target; ++i) {
    sums[points[i].low] += points[i].from_low;
    sums[points[i].high] += points[i].from_high;
  }
  for (int64_t i = 0; i < target; ++i) {
    points[i].from_low /= sums[points[i].low];
    points[i].from_high /= sums[points[i].high];
  }
}

// out (count) = the row of a coarse map (keys) at count fine keys from first on; line holds one grid row of coarse
// keys.
void interpolate_keys(const float* row, int64_t width, const Interpolant* down, const Interpolant* across,
                      int64_t fine_width, int64_t first, int64_t count, float* line, float* out) {
  for (int64_t done = 0; done < count;) {
    const Interpolant& y = down[(first + done) / fine_width];
    const Interpolant* const x = across + (first + done) % fine_width;
    const int64_t left = fine_width - (first + done) % fine_width;
    const int64_t run = left < count - done ? left : count - done;
    const float* const low = row + y.low * width;
    const float* const high = row + y.high * width;
    // only the part of the line between these keys is needed
    const int64_t end = x[run - 1].high + 1;
    int64_t c = x[0].low;
    for (; c + kLanes <= end; c += kLanes) store(line + c, y.from_low * load(low + c) + y.from_high * load(high + c));
    for (; c < end; ++c) line[c] = y.from_low * low[c] + y.from_high * high[c];
    for (int64_t i = 0; i < run; ++i) out[done + i] = x[i].from_low * line[x[i].low] + x[i].from_high * line[x[i].high];
    done += run;
  }
}

// Adds the map of the `mapped` tokens before `end` to total, and writes what the heads mix of value to mixed; either
// may be null. See the entry points.
void attend_blocks(float* total, float* mixed, const float* query, const float* key, const float* value, int64_t batch,
                   int64_t heads, int64_t tokens, int64_t channels, int64_t mapped, int64_t end, float weight,
                   float scale, int num_threads) {
  const int64_t begin = end - mapped;
  const int64_t mapped_columns = round_up(mapped, kTileColumns);
  const int64_t columns = round_up(tokens, kTileColumns);
  const int64_t panels = columns / kTileColumns;
  const int64_t blocks = round_up(tokens, kBlockRows) / kBlockRows;
  const int64_t width = mixed == nullptr ? 0 : round_up(channels, kLanes);
  const Scratch packed_keys(batch * heads * columns * channels);
  const Scratch padded_values(batch * heads * columns * width);
  const Scratch packed_queries(num_threads * kBlockRows * channels);
  const Scratch logits(num_threads * kBlockRows * columns);
  const Scratch products(num_threads * kBlockRows * width);
  const Scratch parts(mapped < tokens ? num_threads * mapped_columns : 0);

  parallel_for(batch * heads * panels, num_threads, [&](int64_t item, int) {
    const int64_t map = item / panels, panel = item % panels;
    pack_panel(key + map * tokens * channels, tokens, channels, panel, packed_keys.data + map * columns * channels);
    if (mixed == nullptr) return;
    // values of keys that only fill a panel are 0, as their masses are
    for (int64_t j = panel * kTileColumns; j < (panel + 1) * kTileColumns; ++j)
      pad_row(value + (map * tokens + j) * channels, j < tokens ? channels : 0, 1,
              padded_values.data + (map * columns + j) * width, width);
  });

  parallel_for(batch * blocks, num_threads, [&](int64_t item, int thread) {
    const int64_t image = item / blocks;
    const int64_t first = item % blocks * kBlockRows;
    const int64_t rows = tokens - first < kBlockRows ? tokens - first : kBlockRows;
    float* const block_queries = packed_queries.data + thread * kBlockRows * channels;
    float* const masses = logits.data + thread * kBlockRows * columns;
    float* const block_products = products.data + thread * kBlockRows * width;
    for (int64_t map = image * heads; map < (image + 1) * heads; ++map) {
      check_interrupt();
      pack_queries(query + (map * tokens + first) * channels, rows, channels, scale, block_queries);
      multiply_block(block_queries, packed_keys.data + map * columns * channels, channels, rows, columns, masses,
                     columns);
      float factors[kBlockRows];
      for (int64_t r = 0; r < rows; ++r) {
        float* const row = masses + r * columns;
        mask_padding(row, tokens, columns);
        const int64_t token = first + r - begin;
        float* const sums =
            total != nullptr && token >= 0 && token < mapped ? total + (image * mapped + token) * mapped : nullptr;
        if (sums != nullptr && mapped < tokens) {
          // a part of the row has another maximum: beside larger logits of other tokens its masses may vanish
          float* const part = parts.data + thread * mapped_columns;
          std::memcpy(part, row + begin, mapped * sizeof(float));
          mask_padding(part, mapped, mapped_columns);
          const float mass = exponentiate(part, mapped_columns, top_logit(part, mapped_columns));
          add_row(part, mapped, weight / heads * (1 / mass), sums);
        }
        factors[r] = 1 / exponentiate(row, columns, top_logit(row, columns));
        if (sums != nullptr && mapped == tokens) add_row(row, tokens, weight / heads * factors[r], sums);
      }
      if (mixed == nullptr) continue;
      fill(block_products, kBlockRows * width, 0);
      for (int64_t chunk = 0; chunk < columns; chunk += kChunk)
        add_products(masses + chunk, columns, padded_values.data + (map * columns + chunk) * width,
                     columns - chunk < kChunk ? columns - chunk : kChunk, width, rows, block_products);
      for (int64_t r = 0; r < rows; ++r) {
        float* const out = mixed + ((image * tokens + first + r) * heads + map % heads) * channels;
        for (int64_t c = 0; c < channels; ++c) out[c] = factors[r] * block_products[r * width + c];
      }
    }
  });
}

}  // namespace

template <>
void accumulate_attention<TRACE_FAST_ISA>(float* total, const float* query, const float* key, int64_t batch,
                                          int64_t heads, int64_t tokens, int64_t channels, float weight, float scale,
                                          int num_threads) {
  attend_blocks(total, nullptr, query, key, nullptr, batch, heads, tokens, channels, tokens, tokens, weight, scale,
                num_threads);
}

template <>
void attend<TRACE_FAST_ISA>(const float* query, const float* key, const float* value, int64_t batch, int64_t heads,
                            int64_t tokens, int64_t channels, float scale, float* mixed, int num_threads) {
  attend_blocks(nullptr, mixed, query, key, value, batch, heads, tokens, channels, tokens, tokens, 0, scale,
                num_threads);
}

template <>
void attend_and_accumulate<TRACE_FAST_ISA>(float* total, const float* query, const float* key, const float* value,
                                           int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                                           int64_t mapped, int64_t end, float weight, float scale, float* mixed,
                                           int num_threads) {
  attend_blocks(total, mixed, query, key, value, batch, heads, tokens, channels, mapped, end, weight, scale,
                num_threads);
}

template <>
void readout<TRACE_FAST_ISA>(const float* query, const float* key, const float* values, int64_t batch, int64_t heads,
                             int64_t tokens, int64_t channels, int64_t columns, float scale, float* parts, float* lse,
                             int num_threads) {
  const int64_t keys = round_up(tokens, kTileColumns);
  const int64_t panels = keys / kTileColumns;
  const int64_t blocks = round_up(tokens, kBlockRows) / kBlockRows;
  const int64_t dots = round_up(columns, kTileDots) * kLanes;
  const Scratch packed_keys(batch * heads * keys * channels);
  const Scratch packed_values(keys * columns);
  const Scratch packed_queries(num_threads * kBlockRows * channels);
  const Scratch logits(num_threads * kBlockRows * kChunk);
  const Scratch sums(num_threads * kBlockRows * dots);

  parallel_for((batch * heads + 1) * panels, num_threads, [&](int64_t item, int) {
    const int64_t map = item / panels;
    if (map == batch * heads)
      pack_panel(values, tokens, columns, item % panels, packed_values.data);
    else
      pack_panel(key + map * tokens * channels, tokens, channels, item % panels,
                 packed_keys.data + map * keys * channels);
  });

  parallel_for(batch * heads * blocks, num_threads, [&](int64_t item, int thread) {
    const int64_t map = item / blocks;
    const int64_t first = item % blocks * kBlockRows;
    const int64_t rows = tokens - first < kBlockRows ? tokens - first : kBlockRows;
    float* const block_queries = packed_queries.data + thread * kBlockRows * channels;
    float* const block_logits = logits.data + thread * kBlockRows * kChunk;
    float* const block_sums = sums.data + thread * kBlockRows * dots;
    pack_queries(query + (map * tokens + first) * channels, rows, channels, scale, block_queries);
    float shifts[kBlockRows], masses[kBlockRows];
    fill(shifts, kBlockRows, kLowest);
    fill(masses, kBlockRows, 0);
    fill(block_sums, kBlockRows * dots, 0);
    for (int64_t j = 0; j < keys; j += kChunk) {
      const int64_t width = keys - j < kChunk ? keys - j : kChunk;
      multiply_block(block_queries, packed_keys.data + (map * keys + j) * channels, channels, rows, width, block_logits,
                     kChunk);
      for (int64_t r = 0; r < rows; ++r) {
        float* const row = block_logits + r * kChunk;
        mask_padding(row, tokens - j, width);
        const float top = top_logit(row, width);
        if (top > shifts[r]) {
          // the sums so far are relative to a lower maximum
          const float factor = exp2(splat((shifts[r] - top) * kLog2E))[0];
          for (int64_t c = 0; c < dots; ++c) block_sums[r * dots + c] *= factor;
          masses[r] *= factor;
          shifts[r] = top;
        }
        masses[r] += exponentiate(row, width, shifts[r]);
      }
      for (int64_t c = 0; c < columns; c += kTileDots)
        for (int64_t r = 0; r < rows; r += kTileRows)
          multiply_dots(block_logits + r * kChunk, kChunk, packed_values.data + j * columns, columns, c, width,
                        block_sums + r * dots + c * kLanes, dots);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = map * tokens + first + r;
      lse[row] = shifts[r] * kLog2E + log2(splat(masses[r]))[0];
      for (int64_t c = 0; c < columns; ++c)
        parts[row * columns + c] = sum(load(block_sums + r * dots + c * kLanes)) / masses[r];
    }
  });
}

template <>
void readout_backward<TRACE_FAST_ISA>(const float* grad, const float* delta, const float* query, const float* key,
                                      const float* values, const float* lse, int64_t batch, int64_t heads,
                                      int64_t tokens, int64_t channels, int64_t columns, float scale, float* grad_query,
                                      float* grad_key, float* grad_values, int num_threads) {
  const int64_t keys = round_up(tokens, kTileColumns);
  const int64_t panels = keys / kTileColumns;
  const int64_t wide_channels = round_up(channels, kTileRows), wide_columns = round_up(columns, kTileRows);
  const int64_t dots = wide_channels * kLanes;
  const Scratch packed_values(keys * columns);
  const Scratch packed_keys(num_threads * keys * channels);
  const Scratch key_sums(num_threads * keys * wide_channels);
  const Scratch value_sums(num_threads * keys * wide_columns);
  const Scratch query_sums(num_threads * kBlockRows * dots);
  // queries and gradients of a block of rows: packed for products with keys and values, padded for products with rows
  const Scratch packed_rows(num_threads * kBlockRows * (channels + columns));
  const Scratch padded_rows(num_threads * kBlockRows * (wide_channels + wide_columns));
  const Scratch masses(num_threads * kBlockRows * keys);
  const Scratch slopes(num_threads * kBlockRows * kChunk);

  parallel_for(panels, num_threads,
               [&](int64_t panel, int) { pack_panel(values, tokens, columns, panel, packed_values.data); });

  parallel_for(batch * heads, num_threads, [&](int64_t map, int thread) {
    const float* const map_grad = grad + map / heads * tokens * columns;
    float* const map_keys = packed_keys.data + thread * keys * channels;
    float* const map_key_sums = key_sums.data + thread * keys * wide_channels;
    float* const map_value_sums = value_sums.data + thread * keys * wide_columns;
    float* const block_query_sums = query_sums.data + thread * kBlockRows * dots;
    float* const block_queries = packed_rows.data + thread * kBlockRows * (channels + columns);
    float* const block_grads = block_queries + kBlockRows * channels;
    float* const query_rows = padded_rows.data + thread * kBlockRows * (wide_channels + wide_columns);
    float* const grad_rows = query_rows + kBlockRows * wide_channels;
    float* const block_masses = masses.data + thread * kBlockRows * keys;
    float* const block_slopes = slopes.data + thread * kBlockRows * kChunk;

    for (int64_t panel = 0; panel < panels; ++panel)
      pack_panel(key + map * tokens * channels, tokens, channels, panel, map_keys);
    fill(map_key_sums, keys * wide_channels, 0);
    fill(map_value_sums, keys * wide_columns, 0);

    for (int64_t first = 0; first < tokens; first += kBlockRows) {
      check_interrupt();
      const int64_t rows = tokens - first < kBlockRows ? tokens - first : kBlockRows;
      const int64_t row = map * tokens + first;
      pack_queries(query + row * channels, rows, channels, scale, block_queries);
      pack_queries(map_grad + first * columns, rows, columns, 1, block_grads);
      multiply_block(block_queries, map_keys, channels, rows, keys, block_masses, keys);
      // lse is rounded like a large number, so the masses of a row may not sum to 1: what they weight is divided by it
      float factors[kBlockRows];
      for (int64_t r = 0; r < rows; ++r) {
        mask_padding(block_masses + r * keys, tokens, keys);
        factors[r] = 1 / exponentiate(block_masses + r * keys, keys, lse[row + r] / kLog2E);
        pad_row(query + (row + r) * channels, channels, factors[r] * scale, query_rows + r * wide_channels,
                wide_channels);
        pad_row(map_grad + (first + r) * columns, columns, factors[r], grad_rows + r * wide_columns, wide_columns);
      }
      fill(block_query_sums, kBlockRows * dots, 0);
      for (int64_t chunk = 0; chunk < keys; chunk += kChunk) {
        const int64_t width = keys - chunk < kChunk ? keys - chunk : kChunk;
        multiply_block(block_grads, packed_values.data + chunk * columns, columns, rows, width, block_slopes, kChunk);
        for (int64_t r = 0; r < rows; ++r)
          differentiate(block_masses + r * keys + chunk, width, delta[row + r], block_slopes + r * kChunk);
        for (int64_t j = 0; j < width; j += kTileColumns) {
          for (int64_t c = 0; c < channels; c += kTileRows)
            multiply_tile<true>(query_rows + c, 1, wide_channels, block_slopes + j, kChunk, rows,
                                map_key_sums + (chunk + j) * wide_channels + c * kTileColumns, kTileColumns);
          for (int64_t c = 0; c < columns; c += kTileRows)
            multiply_tile<true>(grad_rows + c, 1, wide_columns, block_masses + chunk + j, keys, rows,
                                map_value_sums + (chunk + j) * wide_columns + c * kTileColumns, kTileColumns);
        }
        for (int64_t c = 0; c < channels; c += kTileDots)
          for (int64_t r = 0; r < rows; r += kTileRows)
            multiply_dots(block_slopes + r * kChunk, kChunk, map_keys + chunk * channels, channels, c, width,
                          block_query_sums + r * dots + c * kLanes, dots);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c)
          grad_query[(row + r) * channels + c] =
              factors[r] * scale * sum(load(block_query_sums + r * dots + c * kLanes));
    }

    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * kTileColumns;
      unpack_panel(map_key_sums + first * wide_channels, tokens, channels, panel, grad_key + map * tokens * channels);
      unpack_panel(map_value_sums + first * wide_columns, tokens, columns, panel, grad_values + map * tokens * columns);
    }
  });
}

template <>
void accumulate_resized<TRACE_FAST_ISA>(float* total, const float* attention, int64_t batch, int64_t height,
                                        int64_t width, int64_t target_height, int64_t target_width, float weight,
                                        int num_threads) {
  const int64_t tokens = height * width, fine_tokens = target_height * target_width;
  const int64_t strips = round_up(fine_tokens, kStrip) / kStrip;
  const int64_t longest = height > width ? height : width;
  const Scratch sums(longest);
  const Scratch points((target_height + target_width) * 2 * kInterpolantFloats);
  Interpolant* const query_down = reinterpret_cast<Interpolant*>(points.data);
  Interpolant* const query_across = query_down + target_height;
  Interpolant* const key_down = query_across + target_width;
  Interpolant* const key_across = key_down + target_height;
  place_points(height, target_height, nullptr, query_down);
  place_points(width, target_width, nullptr, query_across);
  place_points(height, target_height, sums.data, key_down);
  place_points(width, target_width, sums.data, key_across);
  const Scratch lines(num_threads * width);
  const Scratch rings(num_threads * 2 * width * kStrip);

  parallel_for(batch * strips, num_threads, [&](int64_t item, int thread) {
    const int64_t image = item / strips;
    const int64_t first = item % strips * kStrip;
    const int64_t count = fine_tokens - first < kStrip ? fine_tokens - first : kStrip;
    const float* const map = attention + image * tokens * tokens;
    float* const strip = total + image * fine_tokens * fine_tokens + first;
    float* const line = lines.data + thread * width;
    float* const ring = rings.data + thread * 2 * width * kStrip;
    int64_t ready = 0;
    for (int64_t y = 0; y < target_height; ++y) {
      check_interrupt();
      const Interpolant& down = query_down[y];
      // the coarse queries of one grid row, at these fine keys, replace those of two grid rows above
      for (; ready <= down.high; ++ready)
        for (int64_t x = 0; x < width; ++x)
          interpolate_keys(map + (ready * width + x) * tokens, width, key_down, key_across, target_width, first, count,
                           line, ring + (ready % 2 * width + x) * kStrip);
      const float* const low = ring + down.low % 2 * width * kStrip;
      const float* const high = ring + down.high % 2 * width * kStrip;
      for (int64_t x = 0; x < target_width; ++x) {
        const Interpolant& across = query_across[x];
        const float* const corners[] = {low + across.low * kStrip, low + across.high * kStrip,
                                        high + across.low * kStrip, high + across.high * kStrip};
        const float shares[] = {weight * down.from_low * across.from_low, weight * down.from_low * across.from_high,
                                weight * down.from_high * across.from_low, weight * down.from_high * across.from_high};
        float* const row = strip + (y * target_width + x) * fine_tokens;
        int64_t j = 0;
        for (; j + kLanes <= count; j += kLanes) {
          __builtin_prefetch(row + j + fine_tokens, 1);
          store(row + j, load(row + j) + (shares[0] * load(corners[0] + j) + shares[1] * load(corners[1] + j) +
                                          shares[2] * load(corners[2] + j) + shares[3] * load(corners[3] + j)));
        }
        for (; j < count; ++j)
          row[j] += shares[0] * corners[0][j] + shares[1] * corners[1][j] + shares[2] * corners[2][j] +
                    shares[3] * corners[3][j];
      }
    }
  });
}

}  // namespace trace_fast
