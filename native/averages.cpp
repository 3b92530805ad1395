// The moving averages; mirrors batchnorm/core/algebra.py.
#include <cmath>

#include "normalize.hpp"

namespace batchnorm {
namespace {

void move(const Values& average, int64_t i, double value, double weight) {
  if (average) average.set(i, average.get(i) + (value - average.get(i)) * weight);
}

}  // namespace

void track(const Averages& p) {
  double share = p.groups ? 1 / static_cast<double>(p.groups) : 0;
  for (int64_t i = 0; i < p.parameters; i++) {
    double mean = 0, variance = 0;
    for (int64_t g = 0; g < p.groups; g++) {
      mean += p.mean.get(g * p.parameters + i);
      variance += p.variance.get(g * p.parameters + i);
    }
    mean *= share, variance *= share;
    move(p.running_mean, i, mean, p.momentum);
    if (!p.renorm_mean) {
      move(p.running_variance, i, variance * p.bessel, p.momentum);
      continue;
    }
    double sigma = std::sqrt(variance + p.epsilon);
    if (p.running_variance) {
      double stddev = std::sqrt(p.running_variance.get(i) + p.epsilon);
      stddev += (sigma - stddev) * p.momentum;
      double left = stddev * stddev - p.epsilon;
      p.running_variance.set(i, left < 0 ? 0 : left);  // NaN stays
    }
    move(p.renorm_mean, i, mean, p.renorm_momentum);
    move(p.renorm_stddev, i, sigma, p.renorm_momentum);
  }
}

}  // namespace batchnorm
