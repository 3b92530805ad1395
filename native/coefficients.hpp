// The little arithmetic between the passes; it mirrors batchnorm/core/algebra.py.
#pragma once

#include "normalize.hpp"
#include "vectors.hpp"

namespace batchnorm {
namespace {

double root(double v) { return __builtin_sqrt(v); }

// Every option in two numbers for each of n parameters from the i-th on: y = (x - m)/sigma·factor + offset. With renorm,
// after `correction`.
void options(const Forward& p, int64_t i, int64_t n, double* factor, double* offset) {
  for (int64_t c = i; c < i + n; c++) {
    double f = p.renorm_mean ? p.r.get(c) : 1, o = p.renorm_mean ? p.d.get(c) : 0;
    if (p.adjustment_scale) {
      f *= p.adjustment_scale.get(c);
      o = o * p.adjustment_scale.get(c) + p.adjustment_bias.get(c);
    }
    if (p.gamma) {
      f *= p.gamma.get(c);
      o *= p.gamma.get(c);
    }
    if (p.beta) o += p.beta.get(c);
    factor[c - i] = f;
    offset[c - i] = o;
  }
}

// y = (x - origin)·scale + shift, of n features.
template <class M, class Value>
void coefficients(int64_t n, double epsilon, const double* factor, const double* offset, const M* mean,
                  const M* variance, Value* __restrict origin, Value* __restrict scale, Value* __restrict shift) {
  for (int64_t c = 0; c < n; c++) {
    double s = factor[c] / root(static_cast<double>(variance[c]) + epsilon);
    Value near = static_cast<Value>(mean[c]);
    scale[c] = static_cast<Value>(s);
    shift[c] = static_cast<Value>(offset[c] + (static_cast<double>(near) - static_cast<double>(mean[c])) * s);
    origin[c] = near;
  }
}

// Renorm's correction of n parameters from the i-th on.
template <class M>
void correction(const Forward& p, int64_t i, int64_t n, const M* mean, const M* variance) {
  for (int64_t c = 0; c < n; c++) {
    double floor = most(p.renorm_stddev.get(i + c), root(p.epsilon));
    double r = root(static_cast<double>(variance[c]) + p.epsilon) / floor;
    double d = (static_cast<double>(mean[c]) - p.renorm_mean.get(i + c)) / floor;
    if (r < p.rmin) r = p.rmin;
    if (r > p.rmax) r = p.rmax;
    if (d < -p.dmax) d = -p.dmax;
    if (d > p.dmax) d = p.dmax;
    p.r.set(i + c, r);
    p.d.set(i + c, d);
  }
}

void options(const Backward& p, int64_t i, int64_t n, double* factor) {
  for (int64_t c = i; c < i + n; c++) {
    double f = p.gamma ? p.gamma.get(c) : 1;
    if (p.r) f *= p.r.get(c);
    if (p.adjustment_scale) f *= p.adjustment_scale.get(c);
    factor[c - i] = f;
  }
}

// dx = dy·dy_weight + (x - origin)·x_weight + constant, of n features with `count` values each. Adds the sums of dy and
// of dy·(x - m)/sigma to `all` and `normalized`.
template <class Value>
void combination(int64_t n, int64_t count, double epsilon, const double* factor, const Value* variance,
                 const double* sum, const double* centered, Value* __restrict dy_weight, Value* __restrict x_weight,
                 Value* __restrict constant, double* __restrict all, double* __restrict normalized) {
  double share = 1 / static_cast<double>(most<int64_t>(count, 1));
  for (int64_t c = 0; c < n; c++) {
    double inverse = 1 / root(static_cast<double>(variance[c]) + epsilon), k = factor[c] * inverse;
    dy_weight[c] = static_cast<Value>(k);
    x_weight[c] = static_cast<Value>(-k * inverse * inverse * (centered[c] * share));
    constant[c] = static_cast<Value>(-k * (sum[c] * share));
    all[c] += sum[c];
    normalized[c] += centered[c] * inverse;
  }
}

// Gradients of n parameters from the i-th on, from the sums of dy and of dy·(x - m)/sigma over all that they serve.
void parameter_gradients(const Backward& p, int64_t i, int64_t n, const double* sums, const double* normalized) {
  for (int64_t c = i; c < i + n; c++) {
    double sum = sums[c - i];
    double corrected = p.r ? p.r.get(c) * normalized[c - i] + p.d.get(c) * sum : normalized[c - i];
    double a = p.adjustment_scale ? p.adjustment_scale.get(c) : 1;
    double b = p.adjustment_scale ? p.adjustment_bias.get(c) : 0;
    double gamma = p.gamma ? p.gamma.get(c) : 1;
    if (p.dgamma) p.dgamma.set(c, a * corrected + b * sum);
    if (p.dbeta) p.dbeta.set(c, sum);
    if (p.dadjustment_scale) p.dadjustment_scale.set(c, gamma * corrected);
    if (p.dadjustment_bias) p.dadjustment_bias.set(c, gamma * sum);
  }
}

// n values from the i-th on, as they are where the types agree.
template <class Value>
void read(const Values& from, int64_t i, int64_t n, Value* to) {
  if (from.wide == (sizeof(Value) == 8))
    std::memcpy(to, static_cast<const Value*>(from.data) + i, static_cast<size_t>(n) * sizeof(Value));
  else
    for (int64_t c = 0; c < n; c++) to[c] = static_cast<Value>(from.get(i + c));
}
template <class Value>
void write(const Values& to, int64_t i, int64_t n, const Value* from) {
  if (to.wide == (sizeof(Value) == 8))
    std::memcpy(static_cast<Value*>(to.data) + i, from, static_cast<size_t>(n) * sizeof(Value));
  else
    for (int64_t c = 0; c < n; c++) to.set(i + c, static_cast<double>(from[c]));
}

}  // namespace
}  // namespace batchnorm
