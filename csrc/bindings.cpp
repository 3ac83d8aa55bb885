// The Python module trace_fast._C: the entry points of trace_fast.h, with addresses in the place of arrays.
//
// This is the only file that includes pybind11. The launchers in trace_fast/ops check and allocate with torch before
// they call a function here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"
#include "trace_fast.h"

namespace py = pybind11;
using namespace trace_fast;

namespace {

// Returns the instruction sets this machine runs, slowest first.
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

// The versions of an entry point, in the order of Isa.
#if defined(__x86_64__)
#define VERSIONS(op) op<Isa::baseline>, op<Isa::avx2>, op<Isa::avx512>
#else
#define VERSIONS(op) op<Isa::baseline>
#endif

// How an argument comes from Python: numbers as they are.
template <class T>
struct Argument {
  using Python = T;
  static T convert(T value) { return value; }
};

// Arrays by address.
template <class T>
struct Argument<T*> {
  using Python = uintptr_t;
  static T* convert(uintptr_t address) { return reinterpret_cast<T*>(address); }
};

// The only int is the number of threads, which scratch memory is sized by.
template <>
struct Argument<int> {
  using Python = int;
  static int convert(int num_threads) {
    if (num_threads < 1)
      throw std::invalid_argument("_C: num_threads must be at least 1, got " + std::to_string(num_threads));
    return num_threads;
  }
};

#if defined(TRACE_FAST_CUDA)
// Queues by device and stream.
template <>
struct Argument<cuda::Queue> {
  using Python = std::pair<int, uintptr_t>;
  static cuda::Queue convert(const Python& queue) { return {queue.first, reinterpret_cast<void*>(queue.second)}; }
};
#endif

template <class T>
bool is_null(const T& argument) {
  if constexpr (std::is_pointer_v<T>) return argument == nullptr;
  return false;
}

// Sizes are the arguments of type int64_t.
template <class T>
bool is_zero_size(const T& argument) {
  if constexpr (std::is_same_v<T, int64_t>) return argument == 0;
  return false;
}

// Calls a function, unless an address is null, as that of a tensor without storage, though no size is 0.
template <class... Args>
void call(void (*function)(Args...), const char* name, Args... args) {
  if ((is_null(args) || ...) && !(is_zero_size(args) || ...))
    throw std::invalid_argument(std::string("_C: addresses of ") + name + " must not be null");
  function(args...);
}

unsigned long main_thread = 0;  // the only one in which Python runs handlers of signals

// Runs the handlers of signals that have come; returns false if one has raised.
bool check_signals() {
  const py::gil_scoped_acquire acquired;
  return PyErr_CheckSignals() == 0;
}

// Calls an op without the GIL; a signal whose handler raises, as that of Ctrl-C, ends it.
void run_op(const std::function<void()>& op) {
  bool interrupted = false;
  const bool signals = PyThread_get_thread_ident() == main_thread;
  {
    const py::gil_scoped_release released;
    try {
      run_interruptible(
          signals ? &check_signals : nullptr,
          [](const void* context) { (*static_cast<const std::function<void()>*>(context))(); }, &op);
    } catch (const Interrupted&) {
      interrupted = true;
    }
  }
  if (interrupted) throw py::error_already_set();
}

// Adds a function to the module: the version for the instruction set in use, or the only one.
template <class... Args, class... Others>
void bind(py::module_& module, const char* name, void (*first)(Args...), Others... others) {
  const std::array<void (*)(Args...), 1 + sizeof...(others)> versions = {first, others...};
  module.def(name, [name, versions](typename Argument<Args>::Python... args) {
    const size_t version = versions.size() == 1 ? 0 : static_cast<size_t>(chosen.second);
    run_op([&] { call(versions[version], name, Argument<Args>::convert(args)...); });
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native core; see csrc/trace_fast.h.";
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : supported()) names.push_back(set.first);
    return names;
  });
  m.def("instruction_set", [] { return chosen.first; });
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"));

  py::module_ cpu = m.def_submodule("cpu", "The kernels for the CPU.");
#define BIND(op) bind(cpu, #op, VERSIONS(op));
  TRACE_FAST_ENTRY_POINTS(BIND)
  py::module_ gpu = m.def_submodule("cuda", "The kernels for a GPU, if they are built.");
#if defined(TRACE_FAST_CUDA)
  m.def("has_cuda", &cuda::is_available);
#define BIND_CUDA(op) bind(gpu, #op, cuda::op);
  TRACE_FAST_CUDA_ENTRY_POINTS(BIND_CUDA)
#else
  m.def("has_cuda", [] { return false; });
#endif
}
