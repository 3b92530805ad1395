// The moving averages; mirrors batchnorm/core/algebra.py.
#include <cmath>

#include "kernels.hpp"

namespace batchnorm {
namespace {

constexpr int64_t BLOCK = 256;  // parameters that groups are added up for at a time, each group's as they lie in memory

template <class T>
void add(const char* from, double weight, double* __restrict sums, int64_t n) {
  for (int64_t c = 0; c < n; c++) {
    T value;  // which need not be aligned
    std::memcpy(&value, from + c * static_cast<int64_t>(sizeof(T)), sizeof(T));
    sums[c] += static_cast<double>(value) * weight;
  }
}

double count_of(const Averages& p, int64_t group) {
  return p.count ? p.count.get(group) : static_cast<double>(p.view.group_rows(group) * p.view.inner);
}

// Bessel's correction for a group.
double bessel(const Averages& p, int64_t group) {
  double n = count_of(p, group);
  if (p.count) {
    double squares = p.square_count.get(group);
    n = squares > 0 ? n * n / squares : 0;
  }
  return n > 1 ? n / (n - 1) : 1;
}

// The means over virtual batches of n parameters from the i-th on, of `total` values in all.
void average(const Values& moment, const Averages& p, double total, bool unbiased, int64_t i, int64_t n,
             double* means) {
  for (int64_t c = 0; c < n; c++) means[c] = 0;
  for (int64_t g = 0; g < p.view.virtual_batches(); g++) {
    auto* from = static_cast<const char*>(moment.at(g * p.view.parameters() + i));
    double weight = count_of(p, g) / total * (unbiased ? bessel(p, g) : 1);
    moment.doubles ? add<double>(from, weight, means, n) : add<float>(from, weight, means, n);
  }
}

void move(const Values& average, int64_t i, double value, double weight) {
  if (average) average.set(i, average.get(i) + (value - average.get(i)) * weight);
}

void move_parameter(const Averages& p, int64_t i, double mean, double variance) {
  move(p.running_mean, i, mean, p.momentum);
  if (!p.renorm_mean) return move(p.running_variance, i, variance, p.momentum);
  double sigma = std::sqrt(variance + p.epsilon);
  if (p.running_variance) {
    double stddev = p.running_stddev ? p.running_stddev.get(i) : std::sqrt(p.running_variance.get(i) + p.epsilon);
    stddev += (sigma - stddev) * p.momentum;
    if (p.running_stddev) p.running_stddev.set(i, stddev);
    double left = stddev * stddev - p.epsilon;
    p.running_variance.set(i, left < 0 ? 0 : left);  // NaN stays
  }
  move(p.renorm_mean, i, mean, p.renorm_momentum);
  move(p.renorm_stddev, i, sigma, p.renorm_momentum);
}

}  // namespace

bool track(const Averages& p) {
  double total = 0;
  for (int64_t g = 0; g < p.view.virtual_batches(); g++) total += count_of(p, g);
  if (!(total > 0)) return false;
  bool unbiased = p.unbiased && !p.renorm_mean, moved = false;
  for (int64_t i = 0; i < p.view.parameters(); i += BLOCK) {
    int64_t n = p.view.parameters() - i < BLOCK ? p.view.parameters() - i : BLOCK;
    double mean[BLOCK], variance[BLOCK];
    average(p.mean, p, total, false, i, n, mean);
    average(p.variance, p, total, unbiased, i, n, variance);
    for (int64_t c = 0; c < n; c++) {
      if (p.skip_nonfinite && !(std::isfinite(mean[c]) && std::isfinite(variance[c]))) continue;
      move_parameter(p, i + c, mean[c], variance[c]);
      moved = true;
    }
  }
  return moved;
}

}  // namespace batchnorm
