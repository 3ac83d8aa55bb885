// The map of the core: every native entry point, declared once.
//
// The core depends on neither torch nor Python. Arrays are contiguous in row-major order, float32 unless a type says
// otherwise, and allocated by the caller; outputs never overlap inputs. Sizes are int64_t: batch, heads, tokens =
// height * width, channels per head, columns of values; images and masks have height * width pixels, fewer than 2^31.
// A mask or barrier has one byte per pixel, zero or nonzero. Results do not depend on num_threads.
#pragma once

#include <cstdint>

namespace trace_fast {

// The instruction set for which a CPU kernel is compiled. Each cpu/*.cpp is compiled once per member and defines the
// specializations of that member alone; bindings.cpp selects one at run time.
enum class Isa { baseline, avx2, avx512 };

// Adds weight * (mean over heads of softmax(scale * query key^T)) to total, in place.
// total (batch, tokens, tokens); query, key (batch, heads, tokens, channels).
// Holds a packed copy of key and, per thread, one block of rows; never a per-head tokens x tokens map.
template <Isa isa>
void accumulate_attention(float* total, const float* query, const float* key, int64_t batch, int64_t heads,
                          int64_t tokens, int64_t channels, float weight, float scale, int num_threads);

// Writes softmax(scale * query key^T) value of each head.
// query, key, value (batch, heads, tokens, channels); mixed (batch, tokens, heads, channels).
// Holds packed copies of key and value and, per thread, one block of rows.
template <Isa isa>
void attend(const float* query, const float* key, const float* value, int64_t batch, int64_t heads, int64_t tokens,
            int64_t channels, float scale, float* mixed, int num_threads);

// Does what attend does over all tokens, and accumulate_attention over the `mapped` tokens before `end`, from the same
// logits; total (batch, mapped, mapped).
template <Isa isa>
void attend_and_accumulate(float* total, const float* query, const float* key, const float* value, int64_t batch,
                           int64_t heads, int64_t tokens, int64_t channels, int64_t mapped, int64_t end, float weight,
                           float scale, float* mixed, int num_threads);

// Writes softmax(scale * query key^T) values for each head, and log2 of the row sums of exp(scale * query key^T).
// query, key (batch, heads, tokens, channels); values (tokens, columns); parts (batch, heads, tokens, columns);
// lse (batch, heads, tokens). Holds a packed copy of key and values and, per thread, one block of rows.
template <Isa isa>
void readout(const float* query, const float* key, const float* values, int64_t batch, int64_t heads, int64_t tokens,
             int64_t channels, int64_t columns, float scale, float* parts, float* lse, int num_threads);

// Writes the gradients of readout with respect to query and key, and the contribution of each head to that of values.
// grad (batch, tokens, columns) is the gradient of the parts of every head; delta (batch, heads, tokens) sums
// grad * parts; lse is written by readout. grad_query, grad_key (batch, heads, tokens, channels); grad_values (batch,
// heads, tokens, columns).
template <Isa isa>
void readout_backward(const float* grad, const float* delta, const float* query, const float* key, const float* values,
                      const float* lse, int64_t batch, int64_t heads, int64_t tokens, int64_t channels, int64_t columns,
                      float scale, float* grad_query, float* grad_key, float* grad_values, int num_threads);

// Adds weight * U attention diag(1 / column sums of U) U^T to total, in place, where U interpolates grids bilinearly.
// total (batch, target tokens, target tokens); attention (batch, tokens, tokens); target >= size on both axes.
// Holds, per thread, two grid rows of queries for a strip of fine keys.
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
void step_kl_abdiv(const float* previous, const float* current, int64_t batch, int64_t height, int64_t width, float* kl,
                   float* abdiv, int num_threads);

// Writes edges, smoothed over 3 x 3 pixels, where they are as strong as one pixel away on both sides of the ridge, and
// 0 elsewhere. edges, suppressed (batch, height, width). like_bsds: whether normals are approximate and edges fade at
// the border, as in the benchmark of BSDS500.
template <Isa isa>
void suppress_nonmaxima(const float* edges, int64_t batch, int64_t height, int64_t width, bool like_bsds,
                        float* suppressed, int num_threads);

// Writes the mask thinned to lines one pixel wide (Guo and Hall). mask, thinned (batch, height, width).
template <Isa isa>
void thin(const uint8_t* mask, int64_t batch, int64_t height, int64_t width, uint8_t* thinned, int num_threads);

// Pairs as many pixels of two masks as possible within a distance in pixels, each in one pair at most, and writes which
// pixels have a partner. All (batch, height, width).
template <Isa isa>
void match_contours(const uint8_t* detected, const uint8_t* truth, int64_t batch, int64_t height, int64_t width,
                    double distance, uint8_t* matched_detected, uint8_t* matched_truth, int num_threads);

// Counts, at each threshold, the pixels that match between the edges of one image and the contours of its annotators.
// edges, ignored (height, width); truths, groups (annotators, height, width), where groups are bytes below num_groups;
// thresholds (num_thresholds); counts (num_thresholds, 6) int64, documented at reference.count_matches; group_counts
// (num_thresholds, num_groups) int64. thinning: whether to thin the edges at each threshold.
template <Isa isa>
void count_matches(const float* edges, const uint8_t* truths, const uint8_t* ignored, const uint8_t* groups,
                   const float* thresholds, int64_t annotators, int64_t height, int64_t width, int64_t num_thresholds,
                   int64_t num_groups, double distance, bool thinning, int64_t* counts, int64_t* group_counts,
                   int num_threads);

// Writes the number of the region of each pixel, from 1 in raster order and 0 on the barrier, and the number of
// regions. barrier, labels (batch, height, width); counts (batch). diagonal: whether pixels that touch at a corner are
// connected.
template <Isa isa>
void label_regions(const uint8_t* barrier, int64_t batch, int64_t height, int64_t width, bool diagonal, int32_t* labels,
                   int32_t* counts, int num_threads);

// Writes the label of the nearest seed, in steps off the barrier, the lowest among equally near ones, and 0 where no
// seed can reach. seeds, barrier, labels (batch, height, width); a seed is at least 1 and off the barrier.
// claim_barrier: whether the labels finally grow over the barrier too, in steps on it alone.
template <Isa isa>
void flood_fill(const int32_t* seeds, const uint8_t* barrier, int64_t batch, int64_t height, int64_t width,
                bool diagonal, bool claim_barrier, int32_t* labels, int num_threads);

// Writes the basin of each pixel, from 1 in raster order of their minima, and the number of basins.
// edges, labels (batch, height, width), edges clamped to [0, 1]; counts (batch).
template <Isa isa>
void watershed(const float* edges, int64_t batch, int64_t height, int64_t width, int32_t* labels, int32_t* counts,
               int num_threads);

// Merges the regions of an image at their weakest boundaries, and writes for each node of the tree its parent (the root
// is its own) and the strength of the boundary between its two parts, 0 for a region.
// labels, edges (height, width), labels 1 to count, each present; parents, levels (2 * count - 1).
template <Isa isa>
void merge_tree(const int32_t* labels, const float* edges, int64_t height, int64_t width, int64_t count,
                int32_t* parents, float* levels);

// Writes masks * (1 - edges) after a random walk: each step averages the pixels closer than radius, weighted by their
// affinity (1 - the strongest edge on the path between them)^beta.
// masks, walked (batch, count, height, width); edges (batch, height, width), clamped to [0, 1].
// Holds the affinities of one image, half a disc per pixel, and, per thread, a few of the masks.
template <Isa isa>
void random_walk(const float* masks, const float* edges, int64_t batch, int64_t count, int64_t height, int64_t width,
                 int64_t radius, double beta, int64_t steps, float* walked, int num_threads);

// Writes the index of the union that contains each mask, once all masks that overlap are united; unions are numbered
// from 0 by their first masks. masks (count, height, width); groups (count) int64. Holds the masks as bits.
template <Isa isa>
void merge_masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width, double iou, int64_t* groups,
                 int num_threads);

// Writes the union of the masks of each group; no group is empty.
// masks (count, pixels); groups (count) int64, from 0; merged (unions, pixels) bytes.
template <Isa isa>
void unite_masks(const uint8_t* masks, const int64_t* groups, int64_t count, int64_t pixels, int64_t unions,
                 uint8_t* merged, int num_threads);

// The names of the entry points above: bindings.cpp makes each of them a function of trace_fast._C.cpu.
#define TRACE_FAST_ENTRY_POINTS(X) \
  X(accumulate_attention)          \
  X(attend)                        \
  X(attend_and_accumulate)         \
  X(readout)                       \
  X(readout_backward)              \
  X(accumulate_resized)            \
  X(step_kl)                       \
  X(abdiv)                         \
  X(step_kl_abdiv)                 \
  X(suppress_nonmaxima)            \
  X(thin)                          \
  X(match_contours)                \
  X(count_matches)                 \
  X(label_regions)                 \
  X(flood_fill)                    \
  X(watershed)                     \
  X(merge_tree)                    \
  X(random_walk)                   \
  X(merge_masks)                   \
  X(unite_masks)

#if defined(TRACE_FAST_CUDA)
// The GPU kernels: addresses are of memory on a device, work is queued on one of its streams (a cudaStream_t), and
// nothing waits for it. Scratch memory is allocated by the caller too. A launch that fails throws std::runtime_error.
namespace cuda {

struct Queue {
  int device;
  void* stream;
};

// Returns whether every GPU of this machine, of which there is one at least, and its driver can run the kernels.
bool is_available();

// Writes, for each pixel, the index within its image of the first pixel of its region; on the barrier, its own index.
// barrier, roots (batch, height, width).
void label_roots(const uint8_t* barrier, int64_t batch, int64_t height, int64_t width, bool diagonal, int32_t* roots,
                 Queue queue);

// As flood_fill above. keys (height, width) 64-bit, fronts (2, height, width) and sizes (3) are scratch memory.
void flood_fill(const int32_t* seeds, const uint8_t* barrier, int64_t batch, int64_t height, int64_t width,
                bool diagonal, bool claim_barrier, int32_t* labels, uint64_t* keys, int32_t* fronts, int32_t* sizes,
                Queue queue);

// Runs steps of a random walk from masks (count, height, width). They alternate between masks and others, of the same
// size: an even number of steps ends in masks, an odd number in others.
// powers (height, width) are (1 - edges)^beta; ahead (reach, 2) are the steps (dy, dx) to neighbors that follow in
// raster order; affinities (reach, height, width) is scratch memory.
void random_walk(float* masks, float* others, const float* powers, const int32_t* ahead, int64_t reach, int64_t count,
                 int64_t height, int64_t width, int64_t steps, float* affinities, Queue queue);

// Writes the number of pixels that each two masks share: masks (count, pixels), shared (count, count).
// words (count, pixels / 32, rounded up) is scratch memory.
void shared_pixels(const uint8_t* masks, int64_t count, int64_t pixels, uint32_t* words, int32_t* shared, Queue queue);

// Sets the pixels of the masks of each group, groups (count) int64, in merged (unions, pixels), which holds zeros.
void unite_masks(const uint8_t* masks, const int64_t* groups, int64_t count, int64_t pixels, uint8_t* merged,
                 Queue queue);

}  // namespace cuda

// The names of the entry points above: functions of trace_fast._C.cuda.
#define TRACE_FAST_CUDA_ENTRY_POINTS(X) \
  X(label_roots)                        \
  X(flood_fill)                         \
  X(random_walk)                        \
  X(shared_pixels)                      \
  X(unite_masks)
#endif

}  // namespace trace_fast
