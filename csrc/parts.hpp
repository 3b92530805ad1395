// What the two layouts have in common: the parts that a call is cut into, and where the rows of a group lie.
#pragma once

#include "kernels.hpp"
#include "memory.hpp"
#include "passes.hpp"
#include "threads.hpp"

namespace batchnorm {
namespace {

constexpr int64_t PLACES = 4;  // places in memory that are read in turn
constexpr int64_t FIRST = 8;   // rows whose mean sums are measured from at first

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The work of a task: some features of some groups, and of each of these some rows.
struct Part {
  int64_t begin_feature, end_feature, begin_group, end_group, begin_row, end_row;

  int64_t features() const { return end_feature - begin_feature; }
  int64_t rows() const { return end_row - begin_row; }
};

// The row of the whole array that is row i of a group.
int64_t row_of(const View& v, int64_t group, int64_t i) {
  if (v.groups == 1) return i;
  if (v.span == 1) return i * v.groups + group;
  return (i / v.span * v.groups + group) * v.span + i % v.span;
}

template <class E>
bool goes_past_caches(const View& v) {
  return exceeds_caches(v.size() * static_cast<int64_t>(sizeof(typename E::Stored)));
}

// How many features a part takes so that as many bytes lie side by side and the part stays in a cache, which of every
// feature holds `rows` rows; every thread gets as much to do.
constexpr int64_t CACHE = 2 << 20;
template <class E>
int64_t features_at_once(const View& v, int64_t rows, int64_t stretch, bool alone) {
  int64_t run = v.inner * static_cast<int64_t>(sizeof(typename E::Stored));
  int64_t block = most<int64_t>(1, least(ceil_div(stretch, run), CACHE / most<int64_t>(rows * run, 1)));
  if (alone) return least(block, v.features);
  int64_t share = 2 * num_threads();
  return ceil_div(v.features, ceil_div(ceil_div(v.features, block), share) * share);
}

template <class T>
void fill(T* values, int64_t n, T value) {
  for (int64_t i = 0; i < n; i++) values[i] = value;
}

}  // namespace
}  // namespace batchnorm
