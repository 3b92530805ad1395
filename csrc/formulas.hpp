// The four formulas that go over data, each written once: L is the lanes of a vector, or a single one.
//
// Two of them add to sums what an origin near the data is subtracted from, so that little is lost where the mean is
// large beside the spread. `keep` is applied to whatever enters a sum: it makes 0 of the lanes that are not to count.
#pragma once

#include "vectors.hpp"

namespace batchnorm {
namespace {

// N arrays that are read from, and one that is written to, from corresponding places on.
template <class E, int N>
struct Arrays {
  const typename E::Stored* in[N];
  typename E::Stored* out;  // or null

  Arrays at(int64_t i) const {
    Arrays moved = *this;
    for (int k = 0; k < N; k++) moved.in[k] += i;
    if (moved.out != nullptr) moved.out += i;
    return moved;
  }
};

struct MomentsFormula {  // sums of x − origin and of its square
  static constexpr int ARRAYS = 1;
  template <class L, class E, class V, class Keep>
  static void add(const Arrays<E, 1>& x, int64_t i, V origin, Keep&& keep, V& sum, V& squares) {
    V distance = keep(L::load(x.in[0] + i) - origin);
    sum += distance;
    squares += distance * distance;
  }
};

struct NormalizeFormula {  // y = (x − mean)·scale + offset
  static constexpr int ARRAYS = 1, COEFFICIENTS = 3;
  template <class L, class E, class V>
  static V map(const Arrays<E, 1>& x, int64_t i, const V (&by)[3]) {
    V mean = by[0], scale = by[1], offset = by[2];
    return (L::load(x.in[0] + i) - mean) * scale + offset;
  }
};

struct GradientSumsFormula {  // sums of dy and of dy·(x − mean)
  static constexpr int ARRAYS = 2;
  template <class L, class E, class V, class Keep>
  static void add(const Arrays<E, 2>& x_dy, int64_t i, V mean, Keep&& keep, V& sum, V& centered) {
    V dy = keep(L::load(x_dy.in[1] + i));
    sum += dy;
    centered += dy * keep(L::load(x_dy.in[0] + i) - mean);
  }
};

struct GradientCombineFormula {  // dx = a·dy + b·(x − mean) + c
  static constexpr int ARRAYS = 2, COEFFICIENTS = 4;
  template <class L, class E, class V>
  static V map(const Arrays<E, 2>& x_dy, int64_t i, const V (&by)[4]) {
    V mean = by[0], a = by[1], b = by[2], c = by[3];
    return L::load(x_dy.in[1] + i) * a + ((L::load(x_dy.in[0] + i) - mean) * b + c);
  }
};

}  // namespace
}  // namespace batchnorm
