// What a binding that is told how arrays are seen checks before a kernel sees them.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace batchnorm {

// Whether sizes can be told in bytes without overflow.
inline bool countable(const View& v) {
  constexpr int64_t LARGEST = INT64_MAX / 64;
  int64_t values, statistics;
  return !__builtin_mul_overflow(v.rows > 1 ? v.rows : 1, v.features, &values) &&
         !__builtin_mul_overflow(values, v.inner, &values) && values <= LARGEST &&
         !__builtin_mul_overflow(v.groups, v.features, &statistics) && statistics <= LARGEST;
}

// What is wrong with a view, or null.
inline const char* fault(const View& v) {
  if (v.rows < 0 || v.groups < 1 || v.span < 1 || v.features < 1 || v.inner < 1)
    return "a view must have rows >= 0, and groups, span, features and inner >= 1";
  if (!countable(v)) return "a view must have fewer than 2**57 values and statistics";
  if (v.rows % v.span) return "rows must be a multiple of span";
  if (v.rows > 0 && v.rows / v.span < v.groups) return "rows must be at least groups * span";
  if (v.grouped_parameters && v.uneven()) return "rows must be a multiple of groups * span for groups of parameters";
  return nullptr;
}

}  // namespace batchnorm
