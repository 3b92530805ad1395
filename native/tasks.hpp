// What the operations have in common: tasks for threads, scratch memory, and where a row of a group lies.
#pragma once

#include "memory.hpp"
#include "normalize.hpp"
#include "threads.hpp"

namespace batchnorm {
namespace {

constexpr int64_t SERIAL = 1 << 15;  // values below which waking another thread takes longer than the work
constexpr int64_t PLACES = 4;        // places in memory that are read in turn
constexpr int64_t FIRST = 8;         // rows whose mean the others are measured from

template <class F>
void run_tasks(int64_t tasks, bool serial, F&& task) {
  if (serial)
    for (int64_t i = 0; i < tasks; i++) task(i);
  else
    parallel(tasks, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &task);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Stored>
bool goes_past_caches(const View& v) {
  return exceeds_caches(v.size() * static_cast<int64_t>(sizeof(Stored)));
}

// Carve typed arrays out of one piece of scratch memory.
class Carver {
 public:
  Carver(Slot slot, int64_t bytes) : next_(static_cast<char*>(scratch(slot, bytes))), end_(next_ + bytes) {}
  template <class T>
  T* take(int64_t n) {
    char* here = next_;
    next_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
#ifdef BATCHNORM_CHECKED
    if (next_ > end_) __builtin_trap();
#endif
    return reinterpret_cast<T*>(here);
  }

 private:
  char* next_;
  [[maybe_unused]] char* end_;
};

// The row of the whole array that is row i of a group.
int64_t row_of(const View& v, int64_t group, int64_t i) {
  if (v.groups == 1) return i;
  if (v.span == 1) return i * v.groups + group;
  return (i / v.span * v.groups + group) * v.span + i % v.span;
}

}  // namespace
}  // namespace batchnorm
