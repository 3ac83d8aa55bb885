// The Python module trace_fast._C: the only file that knows pybind11. Addresses and sizes in, nothing out.
//
// The launchers in trace_fast/ops check and allocate with torch before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "trace_fast.h"

namespace py = pybind11;
using namespace trace_fast;

namespace {

// The instruction sets this machine runs, slowest first.
std::vector<std::pair<std::string, Isa>> supported() {
  std::vector<std::pair<std::string, Isa>> sets = {{"baseline", Isa::baseline}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.emplace_back("avx2", Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    sets.emplace_back("avx512", Isa::avx512);
#endif
  return sets;
}

std::pair<std::string, Isa> chosen = supported().back();

void set_instruction_set(const std::string& name) {
  for (const auto& set : supported())
    if (set.first == name) {
      chosen = set;
      return;
    }
  throw std::invalid_argument("set_instruction_set: name must be one of instruction_sets(), got " + name);
}

// The specialisation of an entry point for the current instruction set.
#if defined(__x86_64__)
#define SELECT(op)                                   \
  (chosen.second == Isa::avx512 ? op<Isa::avx512>   \
   : chosen.second == Isa::avx2 ? op<Isa::avx2>     \
                                 : op<Isa::baseline>)
#else
#define SELECT(op) (op<Isa::baseline>)
#endif

#if defined(TRACE_FAST_CUDA)
constexpr bool kCuda = true;

cuda::Queue queue(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }
#else
constexpr bool kCuda = false;
#endif

// The values at an address; a null address, as of a tensor without storage, is refused unless there are none.
template <class T>
T* values(uintptr_t address, int64_t size) {
  if (address == 0 && size != 0) throw std::invalid_argument("_C: a pointer is null");
  return reinterpret_cast<T*>(address);
}

float* floats(uintptr_t address, int64_t size) { return values<float>(address, size); }

// Scratch memory is sized by the number of threads.
int positive(int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("_C: num_threads is less than 1");
  return num_threads;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;

  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : supported()) names.push_back(set.first);
    return names;
  });
  m.def("instruction_set", [] { return chosen.first; });
  m.def("has_cuda", [] { return kCuda; });
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"));

  m.def(
      "accumulate_attention",
      [](uintptr_t total, uintptr_t query, uintptr_t key, int64_t batch, int64_t heads, int64_t tokens,
         int64_t channels, float weight, float scale, int num_threads) {
        const int64_t map = batch * tokens * tokens, features = batch * heads * tokens * channels;
        SELECT(accumulate_attention)
        (floats(total, map), floats(query, features), floats(key, features), batch, heads, tokens, channels, weight,
         scale, positive(num_threads));
      },
      py::arg("total"), py::arg("query"), py::arg("key"), py::arg("batch"), py::arg("heads"), py::arg("tokens"),
      py::arg("channels"), py::arg("weight"), py::arg("scale"), py::arg("num_threads"), release_gil());

  m.def(
      "readout",
      [](uintptr_t query, uintptr_t key, uintptr_t values, int64_t batch, int64_t heads, int64_t tokens,
         int64_t channels, int64_t columns, float scale, uintptr_t parts, uintptr_t lse, int num_threads) {
        const int64_t rows = batch * heads * tokens;
        SELECT(readout)
        (floats(query, rows * channels), floats(key, rows * channels), floats(values, tokens * columns), batch, heads,
         tokens, channels, columns, scale, floats(parts, rows * columns), floats(lse, rows), positive(num_threads));
      },
      py::arg("query"), py::arg("key"), py::arg("values"), py::arg("batch"), py::arg("heads"), py::arg("tokens"),
      py::arg("channels"), py::arg("columns"), py::arg("scale"), py::arg("parts"), py::arg("lse"),
      py::arg("num_threads"), release_gil());

  m.def(
      "readout_backward",
      [](uintptr_t grad, uintptr_t delta, uintptr_t query, uintptr_t key, uintptr_t values, uintptr_t lse,
         int64_t batch, int64_t heads, int64_t tokens, int64_t channels, int64_t columns, float scale,
         uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_values, int num_threads) {
        const int64_t rows = batch * heads * tokens, features = rows * channels;
        SELECT(readout_backward)
        (floats(grad, batch * tokens * columns), floats(delta, rows), floats(query, features), floats(key, features),
         floats(values, tokens * columns), floats(lse, rows), batch, heads, tokens, channels, columns, scale,
         floats(grad_query, features), floats(grad_key, features), floats(grad_values, rows * columns),
         positive(num_threads));
      },
      py::arg("grad"), py::arg("delta"), py::arg("query"), py::arg("key"), py::arg("values"), py::arg("lse"),
      py::arg("batch"), py::arg("heads"), py::arg("tokens"), py::arg("channels"), py::arg("columns"), py::arg("scale"),
      py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_values"), py::arg("num_threads"), release_gil());

  m.def(
      "accumulate_resized",
      [](uintptr_t total, uintptr_t attention, int64_t batch, int64_t height, int64_t width, int64_t target_height,
         int64_t target_width, float weight, int num_threads) {
        const int64_t tokens = height * width, fine_tokens = target_height * target_width;
        SELECT(accumulate_resized)
        (floats(total, batch * fine_tokens * fine_tokens), floats(attention, batch * tokens * tokens), batch, height,
         width, target_height, target_width, weight, positive(num_threads));
      },
      py::arg("total"), py::arg("attention"), py::arg("batch"), py::arg("height"), py::arg("width"),
      py::arg("target_height"), py::arg("target_width"), py::arg("weight"), py::arg("num_threads"), release_gil());

  m.def(
      "step_kl",
      [](uintptr_t previous, uintptr_t current, int64_t batch, int64_t tokens, uintptr_t kl, int num_threads) {
        const int64_t map = batch * tokens * tokens;
        SELECT(step_kl)(floats(previous, map), floats(current, map), batch, tokens, floats(kl, batch),
                        positive(num_threads));
      },
      py::arg("previous"), py::arg("current"), py::arg("batch"), py::arg("tokens"), py::arg("kl"),
      py::arg("num_threads"), release_gil());

  m.def(
      "abdiv",
      [](uintptr_t attention, int64_t batch, int64_t height, int64_t width, uintptr_t scores, int num_threads) {
        const int64_t tokens = height * width;
        SELECT(abdiv)
        (floats(attention, batch * tokens * tokens), batch, height, width, floats(scores, batch * tokens),
         positive(num_threads));
      },
      py::arg("attention"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("abdiv"),
      py::arg("num_threads"), release_gil());

  m.def(
      "step_kl_abdiv",
      [](uintptr_t previous, uintptr_t current, int64_t batch, int64_t height, int64_t width, uintptr_t kl,
         uintptr_t scores, int num_threads) {
        const int64_t tokens = height * width, map = batch * tokens * tokens;
        SELECT(step_kl_abdiv)
        (floats(previous, map), floats(current, map), batch, height, width, floats(kl, batch),
         floats(scores, batch * tokens), positive(num_threads));
      },
      py::arg("previous"), py::arg("current"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("kl"),
      py::arg("abdiv"), py::arg("num_threads"), release_gil());

  m.def(
      "suppress_nonmaxima",
      [](uintptr_t edges, int64_t batch, int64_t height, int64_t width, uintptr_t suppressed, int num_threads) {
        const int64_t size = batch * height * width;
        SELECT(suppress_nonmaxima)
        (floats(edges, size), batch, height, width, floats(suppressed, size), positive(num_threads));
      },
      py::arg("edges"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("suppressed"),
      py::arg("num_threads"), release_gil());

  m.def(
      "thin",
      [](uintptr_t mask, int64_t batch, int64_t height, int64_t width, uintptr_t thinned, int num_threads) {
        const int64_t size = batch * height * width;
        SELECT(thin)
        (values<uint8_t>(mask, size), batch, height, width, values<uint8_t>(thinned, size), positive(num_threads));
      },
      py::arg("mask"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("thinned"),
      py::arg("num_threads"), release_gil());

  m.def(
      "match_contours",
      [](uintptr_t detected, uintptr_t truth, int64_t batch, int64_t height, int64_t width, double distance,
         uintptr_t matched_detected, uintptr_t matched_truth, int num_threads) {
        const int64_t size = batch * height * width;
        SELECT(match_contours)
        (values<uint8_t>(detected, size), values<uint8_t>(truth, size), batch, height, width, distance,
         values<uint8_t>(matched_detected, size), values<uint8_t>(matched_truth, size), positive(num_threads));
      },
      py::arg("detected"), py::arg("truth"), py::arg("batch"), py::arg("height"), py::arg("width"),
      py::arg("distance"), py::arg("matched_detected"), py::arg("matched_truth"), py::arg("num_threads"),
      release_gil());

  m.def(
      "count_matches",
      [](uintptr_t edges, uintptr_t truths, uintptr_t ignored, uintptr_t groups, uintptr_t thresholds,
         int64_t annotators, int64_t height, int64_t width, int64_t levels, int64_t num_groups, double distance,
         bool thins, uintptr_t counts, uintptr_t group_counts, int num_threads) {
        const int64_t size = height * width;
        SELECT(count_matches)
        (floats(edges, size), values<uint8_t>(truths, annotators * size), values<uint8_t>(ignored, size),
         values<uint8_t>(groups, annotators * size), floats(thresholds, levels), annotators, height, width, levels,
         num_groups, distance, thins, values<int64_t>(counts, 6 * levels),
         values<int64_t>(group_counts, levels * num_groups), positive(num_threads));
      },
      py::arg("edges"), py::arg("truths"), py::arg("ignored"), py::arg("groups"), py::arg("thresholds"),
      py::arg("annotators"), py::arg("height"), py::arg("width"), py::arg("levels"), py::arg("num_groups"),
      py::arg("distance"), py::arg("thins"), py::arg("counts"), py::arg("group_counts"), py::arg("num_threads"),
      release_gil());

  m.def(
      "label_regions",
      [](uintptr_t barrier, int64_t batch, int64_t height, int64_t width, bool diagonal, uintptr_t labels,
         uintptr_t counts, int num_threads) {
        const int64_t pixels = batch * height * width;
        SELECT(label_regions)
        (values<uint8_t>(barrier, pixels), batch, height, width, diagonal, values<int32_t>(labels, pixels),
         values<int32_t>(counts, batch), positive(num_threads));
      },
      py::arg("barrier"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("diagonal"), py::arg("labels"),
      py::arg("counts"), py::arg("num_threads"), release_gil());

  m.def(
      "flood_fill",
      [](uintptr_t seeds, uintptr_t barrier, int64_t batch, int64_t height, int64_t width, bool diagonal,
         bool claim_barrier, uintptr_t labels, int num_threads) {
        const int64_t pixels = batch * height * width;
        SELECT(flood_fill)
        (values<int32_t>(seeds, pixels), values<uint8_t>(barrier, pixels), batch, height, width, diagonal,
         claim_barrier, values<int32_t>(labels, pixels), positive(num_threads));
      },
      py::arg("seeds"), py::arg("barrier"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("diagonal"),
      py::arg("claim_barrier"), py::arg("labels"), py::arg("num_threads"), release_gil());

  m.def(
      "random_walk",
      [](uintptr_t masks, uintptr_t edges, int64_t batch, int64_t count, int64_t height, int64_t width, int64_t radius,
         double beta, int64_t steps, uintptr_t walked, int num_threads) {
        const int64_t pixels = batch * height * width;
        SELECT(random_walk)
        (floats(masks, count * pixels), floats(edges, pixels), batch, count, height, width, radius, beta, steps,
         floats(walked, count * pixels), positive(num_threads));
      },
      py::arg("masks"), py::arg("edges"), py::arg("batch"), py::arg("count"), py::arg("height"), py::arg("width"),
      py::arg("radius"), py::arg("beta"), py::arg("steps"), py::arg("walked"), py::arg("num_threads"), release_gil());

  m.def(
      "merge_masks",
      [](uintptr_t masks, int64_t count, int64_t height, int64_t width, double iou, uintptr_t groups, int num_threads) {
        SELECT(merge_masks)
        (values<uint8_t>(masks, count * height * width), count, height, width, iou, values<int64_t>(groups, count),
         positive(num_threads));
      },
      py::arg("masks"), py::arg("count"), py::arg("height"), py::arg("width"), py::arg("iou"), py::arg("groups"),
      py::arg("num_threads"), release_gil());

  m.def(
      "unite_masks",
      [](uintptr_t masks, uintptr_t groups, int64_t count, int64_t pixels, int64_t unions, uintptr_t merged,
         int num_threads) {
        SELECT(unite_masks)
        (values<uint8_t>(masks, count * pixels), values<int64_t>(groups, count), count, pixels, unions,
         values<uint8_t>(merged, unions * pixels), positive(num_threads));
      },
      py::arg("masks"), py::arg("groups"), py::arg("count"), py::arg("pixels"), py::arg("unions"), py::arg("merged"),
      py::arg("num_threads"), release_gil());

#if defined(TRACE_FAST_CUDA)
  m.def(
      "cuda_label_roots",
      [](uintptr_t barrier, int64_t batch, int64_t height, int64_t width, bool diagonal, uintptr_t roots, int device,
         uintptr_t stream) {
        const int64_t pixels = batch * height * width;
        cuda::label_roots(values<uint8_t>(barrier, pixels), batch, height, width, diagonal,
                          values<int32_t>(roots, pixels), queue(device, stream));
      },
      py::arg("barrier"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("diagonal"), py::arg("roots"),
      py::arg("device"), py::arg("stream"), release_gil());

  m.def(
      "cuda_flood_fill",
      [](uintptr_t seeds, uintptr_t barrier, int64_t batch, int64_t height, int64_t width, bool diagonal,
         bool claim_barrier, uintptr_t labels, uintptr_t keys, uintptr_t fronts, uintptr_t sizes, int device,
         uintptr_t stream) {
        const int64_t image = height * width, pixels = batch * image;
        cuda::flood_fill(values<int32_t>(seeds, pixels), values<uint8_t>(barrier, pixels), batch, height, width,
                         diagonal, claim_barrier, values<int32_t>(labels, pixels), values<uint64_t>(keys, image),
                         values<int32_t>(fronts, 2 * image), values<int32_t>(sizes, 3), queue(device, stream));
      },
      py::arg("seeds"), py::arg("barrier"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("diagonal"),
      py::arg("claim_barrier"), py::arg("labels"), py::arg("keys"), py::arg("fronts"), py::arg("sizes"),
      py::arg("device"), py::arg("stream"), release_gil());

  m.def(
      "cuda_random_walk",
      [](uintptr_t masks, uintptr_t others, uintptr_t powers, uintptr_t ahead, int64_t reach, int64_t count,
         int64_t height, int64_t width, int64_t steps, uintptr_t affinities, int device, uintptr_t stream) {
        const int64_t pixels = height * width;
        cuda::random_walk(floats(masks, count * pixels), floats(others, count * pixels), floats(powers, pixels),
                          values<int32_t>(ahead, 2 * reach), reach, count, height, width, steps,
                          floats(affinities, reach * pixels), queue(device, stream));
      },
      py::arg("masks"), py::arg("others"), py::arg("powers"), py::arg("ahead"), py::arg("reach"), py::arg("count"),
      py::arg("height"), py::arg("width"), py::arg("steps"), py::arg("affinities"), py::arg("device"),
      py::arg("stream"), release_gil());

  m.def(
      "cuda_shared_pixels",
      [](uintptr_t masks, int64_t count, int64_t pixels, uintptr_t words, uintptr_t shared, int device,
         uintptr_t stream) {
        cuda::shared_pixels(values<uint8_t>(masks, count * pixels), count, pixels,
                            values<uint32_t>(words, count * ((pixels + 31) / 32)),
                            values<int32_t>(shared, count * count), queue(device, stream));
      },
      py::arg("masks"), py::arg("count"), py::arg("pixels"), py::arg("words"), py::arg("shared"), py::arg("device"),
      py::arg("stream"), release_gil());

  m.def(
      "cuda_unite_masks",
      [](uintptr_t masks, uintptr_t groups, int64_t count, int64_t pixels, uintptr_t merged, int device,
         uintptr_t stream) {
        // each group has a mask, and none is written that no group names
        cuda::unite_masks(values<uint8_t>(masks, count * pixels), values<int64_t>(groups, count), count, pixels,
                          values<uint8_t>(merged, count * pixels), queue(device, stream));
      },
      py::arg("masks"), py::arg("groups"), py::arg("count"), py::arg("pixels"), py::arg("merged"), py::arg("device"),
      py::arg("stream"), release_gil());
#endif
}
