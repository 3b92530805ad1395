// Memory: what the kernels use themselves, and what they are given to write to.
#pragma once

#include <cstdint>

namespace batchnorm {

// Arrays for as long as the scope lives, from memory that a thread keeps from call to call and that grows as it is
// asked for. Scopes of a thread are nested, so the inner one ends first.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;

  // n of them, not initialized. Inlined always, as Values are.
  template <class T>
  [[gnu::always_inline]] T* take(int64_t n) {
    return static_cast<T*>(bytes(n * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* bytes(int64_t n);
  int64_t block_, used_;  // where the thread's memory stood when the scope began
};

// Tell the system that all of this memory will be written. Where it is new, and large, it then comes in huge pages, of
// which there are 512 times fewer to provide and to look up.
void will_write(void* data, int64_t bytes);

// Whether an array is so large that writing it past the caches is better, for it would not stay in them until it is
// read.
bool exceeds_caches(int64_t bytes);

}  // namespace batchnorm
