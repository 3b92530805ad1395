// The arithmetic between the passes, by feature; it mirrors batchnorm/core/algebra.py.
#pragma once

#include "kernels.hpp"
#include "vectors.hpp"

namespace batchnorm {
namespace {

constexpr int64_t FEATURES = 256;  // that are worked on at a time where that is cut into tasks

double root(double v) { return __builtin_sqrt(v); }

// n values from the i-th on. They need not be aligned.
template <class From, class To>
void convert(const void* __restrict from, void* __restrict to, int64_t n) {
  if constexpr (sizeof(From) == sizeof(To)) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(From));
  } else {
    for (int64_t c = 0; c < n; c++)
      store_bits(
          static_cast<char*>(to) + c * static_cast<int64_t>(sizeof(To)),
          static_cast<To>(load_bits<From>(static_cast<const char*>(from) + c * static_cast<int64_t>(sizeof(From)))));
  }
}
template <class T>
void read(const Values& from, int64_t i, int64_t n, T* to) {
  from.doubles ? convert<double, T>(from.at(i), to, n) : convert<float, T>(from.at(i), to, n);
}
template <class T>
void write(const Values& to, int64_t i, int64_t n, const T* from) {
  to.doubles ? convert<T, double>(from, to.at(i), n) : convert<T, float>(from, to.at(i), n);
}
// The same of what may be absent.
void read_or(double absent, const Values& from, int64_t i, int64_t n, double* to) {
  if (from)
    read(from, i, n, to);
  else
    for (int64_t c = 0; c < n; c++) to[c] = absent;
}

// Mean and variance from the sums of distances from an origin, and of their squares.
template <class Value>
void moments_about(int64_t n, double count, const Value* origin, const double* sum, const double* squares,
                   double* __restrict mean, double* __restrict variance) {
  double inverse = count > 0 ? 1 / count : 0;
  for (int64_t c = 0; c < n; c++) {
    double delta = sum[c] * inverse, square = squares[c] * inverse - delta * delta;
    mean[c] = static_cast<double>(origin[c]) + delta;
    variance[c] = square < 0 ? 0 : square;  // NaN stays
  }
}

// Moves origins to the means that these sums say, where they are so far from these, beside the spread, that sums of
// squares in float have lost it; not for what is rounding. Returns whether any has moved.
template <class Value>
bool approach(int64_t n, double count, const double* sum, const double* squares, Value* __restrict origin) {
  constexpr double FAR = 64, ROUNDING = 0x1p-36;  // of squares
  double inverse = count > 0 ? 1 / count : 0;
  int64_t moved = 0;
  for (int64_t c = 0; c < n; c++) {
    double from = static_cast<double>(origin[c]), delta = sum[c] * inverse, square = delta * delta;
    bool far = (square > FAR * (squares[c] * inverse - square)) & (square > ROUNDING * from * from);
    origin[c] = far ? static_cast<Value>(from + delta) : origin[c];
    moved += far;
  }
  return moved > 0;
}

// Renorm's r and d of n parameters from the i-th on.
void correction(const Forward& p, int64_t i, int64_t n, const double* mean, const double* variance) {
  for (int64_t c = 0; c < n; c++) {
    double floor = most(p.renorm_stddev.get(i + c), root(p.epsilon));
    double r = root(variance[c] + p.epsilon) / floor;
    double d = (mean[c] - p.renorm_mean.get(i + c)) / floor;
    if (r < p.rmin) r = p.rmin;
    if (r > p.rmax) r = p.rmax;
    if (d < -p.dmax) d = -p.dmax;
    if (d > p.dmax) d = p.dmax;
    p.r.set(i + c, r);
    p.d.set(i + c, d);
  }
}

// The same from the means of the groups' moments, [groups][features], where these share parameters; `counts` says of
// how many values each group's are.
template <class Counts>
void shared_correction(const Forward& p, const Counts& counts, int64_t begin, int64_t n, const double* means,
                       const double* variances) {
  double mean[FEATURES], variance[FEATURES], total = 0;
  for (int64_t g = 0; g < p.view.groups; g++) total += counts(g);
  for (int64_t c0 = begin; c0 < begin + n; c0 += FEATURES) {
    int64_t width = least(FEATURES, begin + n - c0);
    for (int64_t c = 0; c < width; c++) mean[c] = variance[c] = 0;
    for (int64_t g = 0; g < p.view.groups; g++) {
      const double *group_mean = means + g * p.view.features + c0,
                   *group_variance = variances + g * p.view.features + c0;
      double share = counts(g) / (total > 0 ? total : 1);
      for (int64_t c = 0; c < width; c++) mean[c] += group_mean[c] * share, variance[c] += group_variance[c] * share;
    }
    correction(p, c0, width, mean, variance);
  }
}

// Calls read(i, m) for the parameters of n statistics from the i-th on, [groups][features], and repeats what it has put
// into `values` where groups share parameters.
template <int N, class Read>
void by_statistic(const View& v, int64_t i, int64_t n, double* const (&values)[N], Read&& read) {
  if (!v.grouped_parameters) i %= v.features;
  int64_t given = v.grouped_parameters ? n : least(n, v.features);
  read(i, given);
  for (double* each : values)
    for (int64_t c = given; c < n; c++) each[c] = each[c - given];
}

// Renorm, factor and offset in one map, y = (x − m)/σ·factor + offset, for n statistics from the i-th on.
void combined(const Forward& p, int64_t i, int64_t n, double* factor, double* offset) {
  by_statistic<2>(p.view, i, n, {factor, offset}, [&](int64_t parameter, int64_t m) {
    read_or(1, p.factor, parameter, m, factor);
    read_or(0, p.offset, parameter, m, offset);
    for (int64_t c = 0; p.renorm_mean && c < m; c++) {
      offset[c] += p.d.get(parameter + c) * factor[c];
      factor[c] *= p.r.get(parameter + c);
    }
  });
}

// y = (x − center)·scale + shift: the center is the mean as arrays of the type hold it, and the shift makes up for what
// that leaves out.
template <class Value>
void normalize_coefficients(int64_t n, double epsilon, const double* factor, const double* offset, const double* mean,
                            const double* variance, Value* __restrict center, Value* __restrict scale,
                            Value* __restrict shift) {
  for (int64_t c = 0; c < n; c++) {
    double s = factor[c] / root(variance[c] + epsilon);
    Value near = static_cast<Value>(mean[c]);
    scale[c] = static_cast<Value>(s);
    shift[c] = static_cast<Value>(offset[c] + (static_cast<double>(near) - mean[c]) * s);
    center[c] = near;
  }
}

// dy is multiplied by it.
void combined(const Backward& p, int64_t i, int64_t n, double* factor) {
  by_statistic<1>(p.view, i, n, {factor}, [&](int64_t parameter, int64_t m) {
    read_or(1, p.factor, parameter, m, factor);
    for (int64_t c = 0; p.r && c < m; c++) factor[c] *= p.r.get(parameter + c);
  });
}

// dx = a·dy + b·(x − center) + c, of n features with `count` values each, from the sums of dy and of dy·(x − center):
// the center is the mean as arrays of the type hold it, and c makes up for what that leaves out. Adds the sums of dy
// and of dy·(x − m)/σ to dy_total and normalized_total.
template <class Value>
void gradient_coefficients(int64_t n, double count, double epsilon, const double* factor, const double* mean,
                           const Value* variance, const double* sum, const double* about_center, Value* __restrict a,
                           Value* __restrict b, Value* __restrict c, double* __restrict dy_total,
                           double* __restrict normalized_total) {
  double share = 1 / (count > 0 ? count : 1);
  for (int64_t i = 0; i < n; i++) {
    double inverse = 1 / root(static_cast<double>(variance[i]) + epsilon), k = factor[i] * inverse;
    double rest = mean[i] - static_cast<double>(static_cast<Value>(mean[i])),
           centered = about_center[i] - rest * sum[i];
    double slope = -k * inverse * inverse * (centered * share);
    a[i] = static_cast<Value>(k);
    b[i] = static_cast<Value>(slope);
    c[i] = static_cast<Value>(-k * (sum[i] * share) - slope * rest);
    dy_total[i] += sum[i];
    normalized_total[i] += centered * inverse;
  }
}

// Gradients of n parameters from the i-th on, from the sums of dy and of dy·(x − m)/σ over all that they serve.
void parameter_gradients(const Backward& p, int64_t i, int64_t n, const double* dy_total,
                         const double* normalized_total) {
  for (int64_t c = 0; c < n; c++) {
    double sum = dy_total[c], normalized = normalized_total[c];
    if (p.dfactor) p.dfactor.set(i + c, p.r ? p.r.get(i + c) * normalized + p.d.get(i + c) * sum : normalized);
    if (p.doffset) p.doffset.set(i + c, sum);
  }
}

}  // namespace
}  // namespace batchnorm
