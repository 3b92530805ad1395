// What replicas of a whole batch add up, and what they make of the sums; mirrors batchnorm/core/algebra.py, whose
// gradient a framework takes: m = Σn·m/n and v = Σn·(v + m²)/n − m², so n·m has the gradient (∂m − 2·m·∂v)/n, and
// n·(v + m²) has ∂v/n, with ∂m = −Σdy·factor/σ and ∂v = −Σdy·(x − m)·factor/(2·σ³).
#pragma once

#include <cmath>

#include "kernels.hpp"

namespace batchnorm {

// Doubles: Σw, Σw², and by feature n·m and n·(v + m²); or the gradients of these, of which the first two are constants.
struct Totals {
  int64_t features;
  double *count, *square_count, *first, *second;

  Totals(const View& view, void* data)
      : features(view.parameters()),
        count(static_cast<double*>(data)),
        square_count(count + 1),
        first(count + 2),
        second(first + features) {}

  // In the place of means and variances.
  void from_moments() const {
    for (int64_t i = 0; i < features; i++) {
      second[i] = *count * (second[i] + first[i] * first[i]);
      first[i] *= *count;
    }
  }
  void to_moments(const Forward& p) const {
    double share = 1 / (*count > 0 ? *count : 1);
    for (int64_t i = 0; i < features; i++) {
      double mean = first[i] * share, variance = second[i] * share - mean * mean;
      p.mean.set(i, mean);
      p.variance.set(i, variance < 0 ? 0 : variance);  // NaN stays
    }
    p.count.set(0, *count);
    p.square_count.set(0, *square_count);
  }
};

// The moments of all, and what is this replica's own.
struct Replica {
  bool doubles;
  double epsilon;
  Values mean, variance;       // [features]
  Values count, factor, r, d;  // [1] and [features], the last three or absent

  double inverse(int64_t i) const { return 1 / std::sqrt(variance.get(i) + epsilon); }
  double scale(int64_t i) const { return (factor ? factor.get(i) : 1) * (r ? r.get(i) : 1); }
  double center(int64_t i) const {  // the mean as the passes take it from x
    return doubles ? mean.get(i) : static_cast<double>(static_cast<float>(mean.get(i)));
  }

  // In the place of the sums of dy and of dy·(x − center).
  void to_gradient(const Totals& t, const Values& dfactor, const Values& doffset) const {
    double share = 1 / (count.get(0) > 0 ? count.get(0) : 1);
    *t.count = *t.square_count = 0;
    for (int64_t i = 0; i < t.features; i++) {
      double sum = t.first[i], over = inverse(i), normalized = (t.second[i] - (mean.get(i) - center(i)) * sum) * over;
      if (dfactor) dfactor.set(i, r ? r.get(i) * normalized + d.get(i) * sum : normalized);
      if (doffset) doffset.set(i, sum);
      double step = scale(i) * over * share;
      t.second[i] = -0.5 * step * over * normalized;
      t.first[i] = -step * sum - 2 * mean.get(i) * t.second[i];
    }
  }
  // dx = a·dy + b·(x − center) + c.
  void to_map(const Totals& t, double* a, double* b, double* c) const {
    for (int64_t i = 0; i < t.features; i++) {
      a[i] = scale(i) * inverse(i);
      b[i] = 2 * t.second[i];
      c[i] = t.first[i] + b[i] * center(i);
    }
  }
};

}  // namespace batchnorm
