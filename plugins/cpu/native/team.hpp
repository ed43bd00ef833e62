// Work in phases on the threads that ONNX Runtime lends, and the memory that one call borrows.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <sched.h>

#include "abi.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quasar {

// Pieces of work that do not depend on each other. Whoever comes takes the next one.
struct Phase {
  void (*run)(void* state, int piece);
  void* state;
  int total;
  alignas(64) std::atomic<int> next{0};
  alignas(64) std::atomic<int> done{0};
};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Phases run one after the other. Any one thread could do all the work alone, so it does not matter how many threads
// come, or when: a thread only ever waits for pieces that another one is working on.
struct Job {
  Phase* phases;
  int count;

  static void work(void* job, size_t) {
    const Job& self = *static_cast<const Job*>(job);
    for (int p = 0; p < self.count; ++p) {
      Phase& phase = self.phases[p];
      for (;;) {
        int piece = phase.next.load(std::memory_order_relaxed);
        if (piece >= phase.total) break;
        piece = phase.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= phase.total) break;
        phase.run(phase.state, piece);
        phase.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < phase.total; ++spins) {
        if (spins < 4096) {
          pause();
        } else {
          sched_yield();
        }
      }
    }
  }
};

constexpr size_t kMostThreads = 64;

inline ort::Status* run(const ort::Api& api, const ort::KernelContext* context, Phase* phases, int count) {
  Job job{phases, count};
  size_t widest = 1;
  for (int p = 0; p < count; ++p) {
    if (static_cast<size_t>(phases[p].total) > widest) widest = static_cast<size_t>(phases[p].total);
  }
  if (widest > kMostThreads) widest = kMostThreads;
  if (widest > 1) return api.parallel_for(context, Job::work, widest, &job);
  Job::work(&job, 0);
  return nullptr;
}

// The cores that this process may use; how work is cut does not change a result.
inline int usable_cores() {
  static std::atomic<int> known{0};
  int cores = known.load(std::memory_order_relaxed);
  if (cores == 0) {
    cores = 4;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
#endif
    known.store(cores, std::memory_order_relaxed);
  }
  return cores;
}

// Items in pieces that shrink: long runs keep memory streaming, short ones at the end let threads finish together.
class Pieces {
 public:
  static constexpr int kMost = 256, kEnough = 200;

  explicit Pieces(int items, int cores = usable_cores()) {
    const int share = 2 * (cores < static_cast<int>(kMostThreads) ? cores : static_cast<int>(kMostThreads));
    // Pieces are never more than `kMost` then, and none takes all that is left.
    const int least = (items + kEnough - 1) / kEnough;
    int next = 0;
    while (next < items) {
      first_[count_++] = next;
      const int piece = (items - next) / share;
      next += piece < least ? least : piece;
    }
    first_[count_] = items;
  }
  int count() const { return count_; }
  int first(int piece) const { return first_[piece]; }

 private:
  int count_ = 0;
  int first_[kMost + 1];
};

// Memory for one call, aligned to cache lines; given back to a small store, so that a round allocates nothing.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_ == nullptr) return;
    for (auto& slot : store_) {
      Block* none = nullptr;
      if (slot.compare_exchange_strong(none, block_)) return;
    }
    std::free(block_);
  }

  // False if there is no memory.
  bool reserve(size_t bytes) {
    for (auto& slot : store_) {
      block_ = slot.exchange(nullptr);
      if (block_ != nullptr) break;
    }
    if (block_ != nullptr && block_->bytes < bytes) {
      std::free(block_);
      block_ = nullptr;
    }
    if (block_ == nullptr) {
      size_t whole = (bytes + sizeof(Block) + 4095) / 4096 * 4096;
      block_ = static_cast<Block*>(std::aligned_alloc(64, whole));
      if (block_ == nullptr) return false;
      block_->bytes = whole - sizeof(Block);
    }
    next_ = reinterpret_cast<char*>(block_ + 1);
    return true;
  }

  template <typename T>
  T* take(size_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += size<T>(count);
    return result;
  }

  template <typename T>
  static constexpr size_t size(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  struct alignas(64) Block {
    size_t bytes;
  };
  Block* block_ = nullptr;
  char* next_ = nullptr;
  static inline std::atomic<Block*> store_[8] = {};
};

}  // namespace quasar
