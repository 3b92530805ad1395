// The four formulas that go over data, each written once, and once more with weights: L is the lanes of a vector, or a
// single one.
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

// The same with what each position weighs: all of a row the same, or each lane its own.
template <class E, int N>
struct Weighted : Arrays<E, N> {
  const typename E::Value* weights;
  bool by_lane;
  bool zeroed;  // whether what weighs nothing is 0 in what is written, and not read in dy

  Weighted at(int64_t i) const {
    Weighted moved = *this;
    static_cast<Arrays<E, N>&>(moved) = Arrays<E, N>::at(i);
    if (by_lane) moved.weights += i;
    return moved;
  }
  template <class L>
  typename L::V weight(int64_t i) const {
    return by_lane ? L::values(weights + i) : L::all(*weights);
  }
};

// Each formula has one with weights. What weighs nothing is selected away and not multiplied by 0, for it may be NaN.
// Those without serve positions that weigh 1; where the formula makes no difference of it (`WEIGHS`), all that weigh
// anything. READS_DROPPED: whether it reads what weighs nothing, unless that is zeroed.

struct WeightedMomentsFormula {  // sums of w·(x − origin) and of w·(x − origin)²
  static constexpr int ARRAYS = 1;
  template <class E>
  using From = Weighted<E, 1>;
  template <class L, class E, class V, class Keep>
  static void add(const Weighted<E, 1>& x, int64_t i, V origin, Keep&& keep, V& sum, V& squares) {
    V weight = x.template weight<L>(i), distance = keep(L::load(x.in[0] + i) - origin);
    distance = weight > 0 ? distance : V{};
    V weighed = weight * distance;
    sum += weighed;
    squares += weighed * distance;
  }
};

struct WeightedNormalizeFormula {  // y = (x − mean)·scale + offset, or 0
  static constexpr int ARRAYS = 1, COEFFICIENTS = 3;
  template <class E>
  using From = Weighted<E, 1>;
  template <class L, class E, class V>
  static V map(const Weighted<E, 1>& x, int64_t i, const V (&by)[3]) {
    V mean = by[0], scale = by[1], offset = by[2];
    V y = (L::load(x.in[0] + i) - mean) * scale + offset;
    return x.template weight<L>(i) > 0 ? y : V{};
  }
};

struct WeightedGradientSumsFormula {  // sums of dy and, where anything is weighed, of dy·(x − mean)
  static constexpr int ARRAYS = 2;
  template <class E>
  using From = Weighted<E, 2>;
  template <class L, class E, class V, class Keep>
  static void add(const Weighted<E, 2>& x_dy, int64_t i, V mean, Keep&& keep, V& sum, V& centered) {
    V weight = x_dy.template weight<L>(i), dy = keep(L::load(x_dy.in[1] + i));
    V product = dy * keep(L::load(x_dy.in[0] + i) - mean);
    if (x_dy.zeroed) dy = weight > 0 ? dy : V{};
    sum += dy;
    centered += weight > 0 ? product : V{};
  }
};

struct WeightedGradientCombineFormula {  // dx = a·dy + w·(b·(x − mean) + c), or 0
  static constexpr int ARRAYS = 2, COEFFICIENTS = 4;
  template <class E>
  using From = Weighted<E, 2>;
  template <class L, class E, class V>
  static V map(const Weighted<E, 2>& x_dy, int64_t i, const V (&by)[4]) {
    V mean = by[0], a = by[1], b = by[2], c = by[3], weight = x_dy.template weight<L>(i);
    V direct = L::load(x_dy.in[1] + i) * a;
    V all = direct + ((L::load(x_dy.in[0] + i) - mean) * b + c) * weight;
    return weight > 0 ? all : x_dy.zeroed ? V{} : direct;
  }
};

struct MomentsFormula {  // sums of x − origin and of its square
  static constexpr int ARRAYS = 1;
  static constexpr bool WEIGHS = true, READS_DROPPED = false;
  using WithWeights = WeightedMomentsFormula;
  template <class E>
  using From = Arrays<E, 1>;
  template <class L, class E, class V, class Keep>
  static void add(const Arrays<E, 1>& x, int64_t i, V origin, Keep&& keep, V& sum, V& squares) {
    V distance = keep(L::load(x.in[0] + i) - origin);
    sum += distance;
    squares += distance * distance;
  }
};

struct NormalizeFormula {  // y = (x − mean)·scale + offset
  static constexpr int ARRAYS = 1, COEFFICIENTS = 3;
  static constexpr bool WEIGHS = false, READS_DROPPED = true;
  using WithWeights = WeightedNormalizeFormula;
  template <class E>
  using From = Arrays<E, 1>;
  template <class L, class E, class V>
  static V map(const Arrays<E, 1>& x, int64_t i, const V (&by)[3]) {
    V mean = by[0], scale = by[1], offset = by[2];
    return (L::load(x.in[0] + i) - mean) * scale + offset;
  }
};

struct GradientSumsFormula {  // sums of dy and of dy·(x − mean)
  static constexpr int ARRAYS = 2;
  static constexpr bool WEIGHS = false, READS_DROPPED = true;
  using WithWeights = WeightedGradientSumsFormula;
  template <class E>
  using From = Arrays<E, 2>;
  template <class L, class E, class V, class Keep>
  static void add(const Arrays<E, 2>& x_dy, int64_t i, V mean, Keep&& keep, V& sum, V& centered) {
    V dy = keep(L::load(x_dy.in[1] + i));
    sum += dy;
    centered += dy * keep(L::load(x_dy.in[0] + i) - mean);
  }
};

struct GradientCombineFormula {  // dx = a·dy + b·(x − mean) + c
  static constexpr int ARRAYS = 2, COEFFICIENTS = 4;
  static constexpr bool WEIGHS = true, READS_DROPPED = true;
  using WithWeights = WeightedGradientCombineFormula;
  template <class E>
  using From = Arrays<E, 2>;
  template <class L, class E, class V>
  static V map(const Arrays<E, 2>& x_dy, int64_t i, const V (&by)[4]) {
    V mean = by[0], a = by[1], b = by[2], c = by[3];
    return L::load(x_dy.in[1] + i) * a + ((L::load(x_dy.in[0] + i) - mean) * b + c);
  }
};

}  // namespace
}  // namespace batchnorm
