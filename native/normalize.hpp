// Batch normalization of contiguous arrays, whatever the options. Knows no framework.
//
// An array is seen as x[rows][features][inner]; row r belongs to virtual batch (r / span) % groups. Features last is
// inner = 1; a whole batch is groups = 1. All arithmetic on single values is in float (double for double arrays), sums
// are carried in double beyond short runs.
#pragma once

#include <cstdint>
#include <cstring>

namespace batchnorm {

enum class Type : int { float32, float64, float16, bfloat16 };

inline int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

struct View {
  int64_t rows, groups, span, features, inner;
  // Whether what is said to be by feature is by group, too: then groups are no virtual batches, but feature axes that
  // others lie behind.
  bool own = false;

  int64_t parameters() const { return own ? groups * features : features; }

  int64_t size() const { return rows * features * inner; }
  int64_t bytes(Type type) const { return size() * size_of(type); }
  int64_t count() const { return groups ? rows / groups * inner : 0; }  // values per group and feature
};

// An array of float or double, by the type of what it goes with; null stands for an absent one.
struct Values {
  void* data = nullptr;
  bool wide = false;

  explicit operator bool() const { return data != nullptr; }
  double get(int64_t i) const { return wide ? load<double>(i) : load<float>(i); }
  void set(int64_t i, double value) const { wide ? store(i, value) : store(i, static_cast<float>(value)); }

 private:
  template <class T>
  T load(int64_t i) const {  // wherever it lies: arrays need not be aligned
    T value;
    std::memcpy(&value, static_cast<const char*>(data) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  template <class T>
  void store(int64_t i, T value) const {
    std::memcpy(static_cast<char*>(data) + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }
};

// y = (((x - m) / sigma * r + d) * a + b) * gamma + beta, all but x and y by feature, m and v also by group. With renorm
// and virtual batches, r and d come from the moments' means over the groups.
struct Forward {
  Type type;
  View view;
  const void* x;
  void* y;
  double epsilon;
  Values gamma, beta;                      // or absent
  Values adjustment_scale, adjustment_bias;  // a and b, or absent
  Values renorm_mean, renorm_stddev;       // or absent
  double rmin, rmax, dmax;
  Values mean, variance;                   // out: [groups][features]
  Values r, d;                             // out with renorm, else not looked at: [features]
};

// dx may lie where dy does, and nowhere else among what is read.
struct Backward {
  Type type;
  View view;
  const void *x, *dy;
  void* dx;
  double epsilon;
  Values mean, variance;                   // of the forward pass
  Values gamma, r, d, adjustment_scale, adjustment_bias;  // or absent
  Values dgamma, dbeta, dadjustment_scale, dadjustment_bias;  // out: [features], or absent
};

// The four passes by themselves, with statistics and coefficients [groups][features].
struct Moments {
  Type type;
  View view;
  const void* x;
  Values mean, variance;
};
struct ScaleShift {
  Type type;
  View view;
  const void* x;
  void* y;
  Values scale, shift;
};
struct GradientSums {
  Type type;
  View view;
  const void *x, *dy;
  Values mean, dy_sum, dy_centered_sum;
};
struct GradientCombine {
  Type type;
  View view;
  const void *x, *dy;
  void* dx;
  Values dy_weight, x_weight, constant;
};

// The step of the moving averages after a forward pass, each moved by its weight of the new value: to the groups' mean
// of the means, and to that of the variances times `bessel`. With renorm its averages move to the mean and to sigma, and
// the running variance is that of a standard deviation that moves to sigma.
struct Averages {
  int64_t parameters, groups;
  Values mean, variance;                   // of the forward pass
  Values running_mean, running_variance;   // in and out, or absent
  double momentum, bessel, epsilon;
  Values renorm_mean, renorm_stddev;       // in and out, or absent
  double renorm_momentum;
};
void track(const Averages& averages);

// What one instruction set offers.
struct Kernels {
  const char* name;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*moments)(const Moments&);
  void (*scale_shift)(const ScaleShift&);
  void (*gradient_sums)(const GradientSums&);
  void (*gradient_combine)(const GradientCombine&);
};

// The best kernels that this processor can run. The environment variable BATCHNORM_ISA (avx512bf16, avx512, avx2 or
// baseline) asks for lesser ones.
const Kernels& kernels();

}  // namespace batchnorm
