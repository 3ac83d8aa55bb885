#include "common.h"

#if defined(__linux__)
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
}

void run_parallel(int64_t count, int num_threads, void (*body)(const void*, int64_t, int), const void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, item, thread);
  };

  // joins on every way out, so that a thread that cannot be started leaves no other behind
  struct Pool {
    std::vector<std::thread> threads;
    ~Pool() {
      for (std::thread& thread : threads) thread.join();
    }
  } pool;
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads, count)) - 1;
  pool.threads.reserve(std::max(helpers, 0));
  for (int i = 0; i < helpers; ++i) pool.threads.emplace_back(work, i + 1);
  work(0);
}

void expect_writes(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLarge * kLarge;
  // only advice: where it is refused, pages stay small
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

Scratch::Scratch(int64_t size) : data(static_cast<float*>(::operator new(size * sizeof(float), kCacheLine))) {}

Scratch::~Scratch() { ::operator delete(data, kCacheLine); }

}  // namespace trace_fast
