// The threads that compute, and the one way work is given to them.
//
// Work is cut into chunks that whoever is free takes next, so a thread that the system has put
// aside (the server's own threads share the cores) delays only the chunk it holds. Which thread
// computes a chunk never changes a result: no kernel reduces across chunks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace gla {

// Used by one thread at a time, which takes its part of the work. The others spin for a short time
// after the last work and then sleep.
class ThreadPool {
 public:
  // `num_threads` counts the caller; at least 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // f(begin, end) over ranges that cover [0, n); returns when all of them are done. `item_ns` is
  // about what one item costs: work that is too small to share runs here, in one call.
  template <typename F>
  void ParallelFor(int64_t n, double item_ns, const F& f) {
    // Handing a chunk over costs about a microsecond, waking a sleeper several.
    constexpr double kWorthSharingNs = 6000, kMinChunkNs = 2000;
    if (n <= 0) return;
    const double total_ns = static_cast<double>(n) * item_ns;
    if (workers_.empty() || n == 1 || total_ns < kWorthSharingNs) return f(0, n);
    const int64_t wanted =
        std::min<int64_t>(n, static_cast<int64_t>(std::min(total_ns / kMinChunkNs, 1e6)));
    const int num_chunks = static_cast<int>(std::clamp<int64_t>(wanted, 2, 4 * num_threads()));
    struct Context {
      const F& f;
      int64_t n;
      int num_chunks;
    } context{f, n, num_chunks};
    Run(num_chunks, &context, [](void* opaque, int chunk) {
      const Context& c = *static_cast<Context*>(opaque);
      c.f(c.n * chunk / c.num_chunks, c.n * (chunk + 1) / c.num_chunks);
    });
  }

 private:
  using Task = void (*)(void* context, int chunk);

  void Run(int num_chunks, void* context, Task task);
  bool RunOneChunk();  // false when none is left
  void WorkerLoop();

  // The round (32 bits), its number of chunks (16) and the next chunk to take (16), in one word: a
  // chunk taken by compare-and-swap therefore belongs to the round whose task is in place.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> round_{0};  // what sleepers wait on
  std::atomic<uint32_t> num_done_{0};
  std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace gla
