#include "common.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace trace_fast {

namespace {
constexpr std::align_val_t kCacheLine{64};
constexpr std::chrono::milliseconds kInterval{50};  // between two questions whether to go on

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

using Clock = std::chrono::steady_clock;

// An op that may be interrupted.
struct Watch {
  bool (*const wanted)();
  Clock::time_point next;
  std::atomic<bool> interrupted{false};
};

// the op that this thread works for, and whether it is the thread of the caller
thread_local Watch* watch = nullptr;
thread_local bool calls = false;

struct Job {
  const int64_t count;
  void (*const body)(const void*, int64_t, int);
  const void* const context;
  Watch* const watched;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure = nullptr;  // the first

  // The work of one thread: it takes a number, then items until there are none left.
  static void enter(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int thread = job.threads.fetch_add(1, std::memory_order_relaxed);
    Watch* const before = watch;
    watch = job.watched;
    try {
      for (int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) {
        check_interrupt();
        job.body(job.context, item, thread);
      }
    } catch (...) {
      job.next.store(job.count, std::memory_order_relaxed);
      if (!job.failed.exchange(true)) job.failure = std::current_exception();
    }
    watch = before;
  }

  void run(int helpers) {
    if (helpers > 0)
      if (const Team team = loaded_team()) return team(&Job::enter, this, helpers + 1, 0);

    // joins in every case, so that the other threads end if one cannot be started
    struct Pool {
      std::vector<std::thread> threads;
      ~Pool() {
        for (std::thread& thread : threads) thread.join();
      }
    } pool;
    pool.threads.reserve(std::max(helpers, 0));
    for (int i = 0; i < helpers; ++i) pool.threads.emplace_back(&Job::enter, this);
    enter(this);
  }
};
}  // namespace

void run_parallel(int64_t count, int num_threads, void (*body)(const void*, int64_t, int), const void* context) {
  Job job{count, body, context, watch};
  job.run(static_cast<int>(std::min<int64_t>(num_threads, count)) - 1);
  if (job.failure) std::rethrow_exception(job.failure);
}

void run_interruptible(bool (*wanted)(), void (*op)(const void*), const void* context) {
  // restores what was before in every case: a handler of a signal may call another op
  struct Scope {
    ~Scope() { watch = before, calls = called; }
    Watch* const before = watch;
    const bool called = calls;
  } scope;
  Watch own{wanted, Clock::now() + kInterval};
  watch = wanted == nullptr ? nullptr : &own;
  calls = true;
  op(context);
}

void check_interrupt() {
  if (watch == nullptr) return;
  if (calls && Clock::now() >= watch->next) {
    Watch& asking = *watch;
    if (!asking.wanted()) asking.interrupted.store(true, std::memory_order_relaxed);
    asking.next = Clock::now() + kInterval;
  }
  if (watch->interrupted.load(std::memory_order_relaxed)) throw Interrupted{};
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
