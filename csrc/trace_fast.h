// The map of the core: every native entry point, declared once.
//
// The core knows neither torch nor Python. Arrays are contiguous in row-major order, float32 but where a type says
// otherwise, and allocated by the caller; outputs never overlap inputs. Sizes are int64_t: batch, heads, tokens = height *
// width, channels per head, columns of values; images and masks have height * width pixels, fewer than 2^31.
// A mask or barrier is bytes, 0 or not.
// Results do not depend on num_threads.
#pragma once

#include <cstdint>

namespace trace_fast {

// The vector unit a CPU kernel is compiled for. Each cpu/*.cpp is compiled once per member and defines the
// specialisations of that member alone; bindings.cpp picks one at run time.
enum class Isa { baseline, avx2, avx512 };

// Adds weight * (mean over heads of softmax(scale * query key^T)) to total, in place.
// total (batch, tokens, tokens); query, key (batch, heads, tokens, channels).
// Holds a packed copy of key and, per thread, one block of rows; never a per-head tokens x tokens map.
template <Isa isa>
void accumulate_attention(float* total, const float* query, const float* key, int64_t batch, int64_t heads,
                          int64_t tokens, int64_t channels, float weight, float scale, int num_threads);

// Writes softmax(scale * query key^T) values of each head, and log2 of the row sums of exp(scale * query key^T).
// query, key (batch, heads, tokens, channels); values (tokens, columns); parts (batch, heads, tokens, columns);
// lse (batch, heads, tokens). Holds a packed copy of key and values and, per thread, one block of rows.
template <Isa isa>
void readout(const float* query, const float* key, const float* values, int64_t batch, int64_t heads, int64_t tokens,
             int64_t channels, int64_t columns, float scale, float* parts, float* lse, int num_threads);

// Writes the gradients of readout by query and key, and by values as far as each head contributes.
// grad (batch, tokens, columns) is that of every head's parts; delta (batch, heads, tokens) sums grad * parts; lse is
// readout's. grad_query, grad_key (batch, heads, tokens, channels); grad_values (batch, heads, tokens, columns).
template <Isa isa>
void readout_backward(const float* grad, const float* delta, const float* query, const float* key, const float* values,
                      const float* lse, int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                      int64_t columns, float scale, float* grad_query, float* grad_key, float* grad_values,
                      int num_threads);

// Adds weight * U attention diag(1 / column sums of U) U^T to total, in place; U interpolates the grid bilinearly.
// total (batch, target tokens, target tokens); attention (batch, tokens, tokens); target >= size on both axes.
// Holds, per thread, two grid rows of queries at a strip of fine keys.
template <Isa isa>
void accumulate_resized(float* total, const float* attention, int64_t batch, int64_t height, int64_t width,
                        int64_t target_height, int64_t target_width, float weight, int num_threads);

// Writes KL(previous || current), in nats, mean over query rows.
// previous, current (batch, tokens, tokens); kl (batch).
template <Isa isa>
void step_kl(const float* previous, const float* current, int64_t batch, int64_t tokens, float* kl, int num_threads);

// Writes KL(right || left) + KL(below || above) of the rows around each token, in nats.
// attention (batch, tokens, tokens); abdiv (batch, height, width).
template <Isa isa>
void abdiv(const float* attention, int64_t batch, int64_t height, int64_t width, float* abdiv, int num_threads);

// Writes step_kl of the pair and abdiv of current, reading each map once.
// previous, current (batch, tokens, tokens); kl (batch); abdiv (batch, height, width).
template <Isa isa>
void step_kl_abdiv(const float* previous, const float* current, int64_t batch, int64_t height, int64_t width,
                   float* kl, float* abdiv, int num_threads);

// Writes the number of each pixel's region, from 1 in raster order, 0 on the barrier; and how many there are.
// barrier, labels (batch, height, width); counts (batch). diagonal: pixels that touch at a corner are connected, too.
template <Isa isa>
void label_regions(const uint8_t* barrier, int64_t batch, int64_t height, int64_t width, bool diagonal, int32_t* labels,
                   int32_t* counts, int num_threads);

// Writes the label of the nearest seed, in steps off the barrier, the lowest of several; 0 where none leads.
// seeds, barrier, labels (batch, height, width); seeds count from 1 and off the barrier. claim_barrier: then the labels
// grow over the barrier, too, in steps on it alone.
template <Isa isa>
void flood_fill(const int32_t* seeds, const uint8_t* barrier, int64_t batch, int64_t height, int64_t width,
                bool diagonal, bool claim_barrier, int32_t* labels, int num_threads);

// Writes where a random walk takes masks * (1 - edges): each step averages the pixels closer than radius by affinity,
// (1 - the strongest edge on the path between them)^beta.
// masks, walked (batch, count, height, width); edges (batch, height, width), clamped to [0, 1].
// Holds the affinities of one image, half a disc of them a pixel, and, per thread, a few of the masks.
template <Isa isa>
void random_walk(const float* masks, const float* edges, int64_t batch, int64_t count, int64_t height, int64_t width,
                 int64_t radius, double beta, int64_t steps, float* walked, int num_threads);

// Writes the number of the union that each mask ends in, from 0 by the first mask, when all that overlap are united.
// masks (count, height, width); groups (count) int64. Holds the masks as bits.
template <Isa isa>
void merge_masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width, double iou, int64_t* groups,
                 int num_threads);

// Writes the union of the masks of each group, of which each has one.
// masks (count, pixels); groups (count) int64, from 0; merged (unions, pixels) bytes.
template <Isa isa>
void unite_masks(const uint8_t* masks, const int64_t* groups, int64_t count, int64_t pixels, int64_t unions,
                 uint8_t* merged, int num_threads);

}  // namespace trace_fast
