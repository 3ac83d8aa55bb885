// Threads, interruption and scratch memory: nothing specific to an op or to an instruction set.
//
// The cpu/*.cpp files are compiled for several instruction sets, so nothing here may be an inline function or a
// template of external linkage: the linker would keep one copy, perhaps one that this machine cannot run.
#pragma once

#include <cstdint>

namespace trace_fast {

// Calls body(context, item, thread) for each item in [0, count) on at most num_threads threads, including this one.
void run_parallel(int64_t count, int num_threads, void (*body)(const void* context, int64_t item, int thread),
                  const void* context);

// Calls body(item, thread) for each item in [0, count); a thread that is free takes the next item. An exception of body
// ends the work, and is thrown again.
template <class Body>
static void parallel_for(int64_t count, int num_threads, const Body& body) {
  run_parallel(
      count, num_threads,
      [](const void* context, int64_t item, int thread) { (*static_cast<const Body*>(context))(item, thread); }, &body);
}

// Thrown by check_interrupt.
struct Interrupted {};

// Calls op(context). Meanwhile check_interrupt asks wanted(), on this thread alone and once in 50 ms, whether to go on;
// a null pointer is never asked.
void run_interruptible(bool (*wanted)(), void (*op)(const void* context), const void* context);

// Throws Interrupted if the op is not wanted any longer. Every op calls it between pieces of work, on all its threads.
void check_interrupt();

// Asks for large pages for memory that is new, so that the first writes cause few page faults. Contents do not change.
void expect_writes(void* data, int64_t bytes);

// Uninitialized floats on a cache-line boundary, freed at the end of the scope.
struct Scratch {
  explicit Scratch(int64_t size);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* const data;
};

namespace {

// Calls check_interrupt once in a while, for pieces of work that are too small for a call each.
struct Pace {
  // Counts work, in units of about a nanosecond.
  void spend(int64_t work) {
    if ((left -= work) > 0) return;
    left = kPause;
    check_interrupt();
  }

  static constexpr int64_t kPause = 1 << 20;
  int64_t left = kPause;
};

// Uninitialized memory for values of a plain type, freed at the end of the scope.
template <class T>
struct Array {
  explicit Array(int64_t size) : memory((size * sizeof(T) + 3) / 4), data(reinterpret_cast<T*>(memory.data)) {}
  T& operator[](int64_t i) const { return data[i]; }

  const Scratch memory;
  T* const data;
};

}  // namespace

}  // namespace trace_fast
