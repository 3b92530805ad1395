// Batch normalization of contiguous arrays: what the kernels compute. They know no framework, and of options only
// renorm: whatever else a layer has is folded into `factor` and `offset`.
//
// An array is seen as x[rows][features][inner]; row r belongs to group (r / span) % groups. Features last is inner = 1;
// a whole batch is groups = 1. Arithmetic on single values is in float (in double for arrays of double), sums are
// carried in double beyond short runs.
#pragma once

#include <cstdint>
#include <cstring>

namespace batchnorm {

enum class Type : int { float32, float64, float16, bfloat16 };

inline int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

struct View {
  int64_t rows, groups, span, features, inner;
  // Whether each group has parameters of its own. Then groups are no virtual batches, but feature axes that other axes
  // lie behind.
  bool grouped_parameters = false;

  int64_t size() const { return rows * features * inner; }
  int64_t bytes(Type type) const { return size() * size_of(type); }
  int64_t statistics() const { return groups * features; }
  int64_t parameters() const { return grouped_parameters ? groups * features : features; }
  int64_t group_rows() const { return groups ? rows / groups : 0; }
  int64_t count() const { return group_rows() * inner; }  // of values that a mean is of
};

// An array of float or double, whatever the type of x; null stands for an absent one. Its functions are inlined always,
// for of several copies, each for an instruction set, a linker keeps only one.
struct Values {
  void* data = nullptr;
  bool doubles = false;

  explicit operator bool() const { return data != nullptr; }
  [[gnu::always_inline]] void* at(int64_t i) const { return static_cast<char*>(data) + i * (doubles ? 8 : 4); }
  [[gnu::always_inline]] double get(int64_t i) const { return doubles ? load<double>(at(i)) : load<float>(at(i)); }
  [[gnu::always_inline]] void set(int64_t i, double value) const {
    doubles ? store(at(i), value) : store(at(i), static_cast<float>(value));
  }

 private:
  template <class T>
  [[gnu::always_inline]] static T load(const void* from) {  // wherever it lies: arrays need not be aligned
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }
  template <class T>
  [[gnu::always_inline]] static void store(void* to, T value) {
    std::memcpy(to, &value, sizeof(T));
  }
};

// y = (r·(x − m)/σ + d)·factor + offset, σ = sqrt(v + epsilon), with the moments m and v of each group. With renorm and
// parameters that groups share, r and d come from the means of the moments over the groups.
struct Forward {
  Type type;
  View view;
  double epsilon;
  const void* x;
  void* y;
  Values factor, offset;              // [parameters], or absent
  Values renorm_mean, renorm_stddev;  // [parameters], or absent
  double rmin, rmax, dmax;
  Values mean, variance;  // out: [groups][features]
  Values r, d;            // out with renorm, else absent: [parameters]
};

// dfactor is the sum of dy·(r·(x − m)/σ + d), doffset that of dy. dx may lie where dy does, and nowhere else among what
// is read.
struct Backward {
  Type type;
  View view;
  double epsilon;
  const void *x, *dy;
  void* dx;
  Values mean, variance;    // of the forward pass: [groups][features]
  Values factor, r, d;      // [parameters], or absent
  Values dfactor, doffset;  // out: [parameters], or absent
};

// The four passes by themselves, with statistics and coefficients [groups][features].
struct Moments {
  Type type;
  View view;
  const void* x;
  Values mean, variance;  // out
};
struct Normalize {  // y = scale·(x − mean) + offset
  Type type;
  View view;
  const void* x;
  void* y;
  Values mean, scale, offset;
};
struct GradientSums {  // of dy, and of dy·(x − mean)
  Type type;
  View view;
  const void *x, *dy;
  Values mean;
  Values dy_sum, dy_centered_sum;  // out
};
struct GradientCombine {  // dx = a·dy + b·(x − mean) + c; dx may lie where dy does
  Type type;
  View view;
  const void *x, *dy;
  void* dx;
  Values mean, a, b, c;
};

// The step of the moving averages after a forward pass, each moved by its weight of the new value: to the groups' mean
// of the means, and to that of the variances times `bessel`. With renorm its averages move to the mean and to sigma,
// and the running variance is that of a standard deviation that moves to sigma: the one given, or else its own.
struct Averages {
  int64_t parameters, groups;
  Values mean, variance;                                  // of the forward pass
  Values running_mean, running_variance, running_stddev;  // in and out, or absent
  double momentum, bessel, epsilon;
  Values renorm_mean, renorm_stddev;  // in and out, or absent
  double renorm_momentum;
};
void track(const Averages& averages);

// What one instruction set offers.
struct Kernels {
  const char* name;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*moments)(const Moments&);
  void (*normalize)(const Normalize&);
  void (*gradient_sums)(const GradientSums&);
  void (*gradient_combine)(const GradientCombine&);
};

// The best kernels that this processor can run. The environment variable BATCHNORM_ISA (avx512bf16, avx512, avx2 or
// baseline) asks for lesser ones; who loads this says so where it is none of them.
const Kernels& kernels();

}  // namespace batchnorm
