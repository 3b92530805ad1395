#include "memory.hpp"

#include <cstdlib>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace batchnorm {
namespace {

constexpr int64_t ALIGNMENT = 128;  // a vector of sixteen doubles

void* allocate(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, ALIGNMENT, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  return data;
}

#ifdef BATCHNORM_CHECKED

// Each array is an allocation of exactly its size, so that a sanitizer sees where it ends.
struct Arena {
  std::vector<void*> arrays;

  int64_t block() const { return 0; }
  int64_t used() const { return static_cast<int64_t>(arrays.size()); }
  void* take(int64_t bytes) {
    arrays.push_back(nullptr);
    return arrays.back() = allocate(bytes > 0 ? bytes : 1);
  }
  void back_to(int64_t, int64_t used) {
    for (; static_cast<int64_t>(arrays.size()) > used; arrays.pop_back()) std::free(arrays.back());
  }
};

#else

// Blocks of memory, of which those before the current one are full. What did not fit into a single block will, once
// nothing is in use.
class Arena {
  static constexpr int64_t LEAST = 64 << 10;

  struct Block {
    char* data;
    int64_t size;
  };
  std::vector<Block> blocks_;
  int64_t block_ = 0, used_ = 0, total_ = 0;

  void release() {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
  }

 public:
  ~Arena() { release(); }
  int64_t block() const { return block_; }
  int64_t used() const { return used_; }

  void* take(int64_t bytes) {
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    while (block_ < static_cast<int64_t>(blocks_.size())) {
      Block& current = blocks_[static_cast<size_t>(block_)];
      if (bytes <= current.size - used_) {
        void* data = current.data + used_;
        used_ += bytes;
        return data;
      }
      block_++;
      used_ = 0;
    }
    int64_t size = bytes > LEAST ? bytes : LEAST;
    if (blocks_.empty() && size < total_) size = total_;
    blocks_.reserve(blocks_.size() + 1);
    blocks_.push_back({static_cast<char*>(allocate(size)), size});
    used_ = bytes;
    return blocks_.back().data;
  }

  void back_to(int64_t block, int64_t used) {
    block_ = block;
    used_ = used;
    if (block > 0 || used > 0 || blocks_.size() < 2) return;
    total_ = 0;
    for (const Block& each : blocks_) total_ += each.size;
    release();
  }
};

#endif

Arena& arena() {
  thread_local Arena of_thread;
  return of_thread;
}

}  // namespace

Scratch::Scratch() : block_(arena().block()), used_(arena().used()) {}
Scratch::~Scratch() { arena().back_to(block_, used_); }
void* Scratch::bytes(int64_t n) { return arena().take(n); }

void will_write([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t LARGE = 4 << 20;
  constexpr uintptr_t PAGE = 2 << 20;
  if (bytes < LARGE) return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail, and nothing is lost
#endif
}

// Not by the size of a cache: a virtual machine reports the last level of the whole processor, of which a few cores
// have little. See docs/performance.md.
bool exceeds_caches(int64_t bytes) { return bytes > 7 << 20; }

}  // namespace batchnorm
