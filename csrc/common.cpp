#include "common.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <vector>

namespace trace_fast {

namespace {
constexpr std::align_val_t kCacheLine{64};

// The type of GOMP_parallel, which every OpenMP runtime on Linux has: it runs a function on a number of threads.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Returns that of the OpenMP runtime which torch has loaded, or null. The threads of this runtime spin for some time
// after they have worked for torch, and would share the cores with threads of another pool.
Team loaded_team() {
#if defined(__linux__)
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return team;
#else
  return nullptr;
#endif
}

struct Job {
  const int64_t count;
  void (*const body)(const void*, int64_t, int);
  const void* const context;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};

  // The work of one thread: it takes a number, then items until there are none left.
  static void enter(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int thread = job.threads.fetch_add(1, std::memory_order_relaxed);
    for (int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
      job.body(job.context, item, thread);
  }
};
}  // namespace

void run_parallel(int64_t count, int num_threads, void (*body)(const void*, int64_t, int), const void* context) {
  Job job{count, body, context};
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads, count)) - 1;
  if (helpers > 0)
    if (const Team team = loaded_team()) return team(&Job::enter, &job, helpers + 1, 0);

  // joins in every case, so that the other threads end if one cannot be started
  struct Pool {
    std::vector<std::thread> threads;
    ~Pool() {
      for (std::thread& thread : threads) thread.join();
    }
  } pool;
  pool.threads.reserve(std::max(helpers, 0));
  for (int i = 0; i < helpers; ++i) pool.threads.emplace_back(&Job::enter, &job);
  Job::enter(&job);
}

void expect_writes(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLarge * kLarge;
  // this is advice: if it is refused, pages stay small
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

Scratch::Scratch(int64_t size) : data(static_cast<float*>(::operator new(size * sizeof(float), kCacheLine))) {}

Scratch::~Scratch() { ::operator delete(data, kCacheLine); }

}  // namespace trace_fast
