// Batch normalization of contiguous arrays: what the kernels compute. They know no framework, and of options only
// renorm: whatever else a layer has is folded into `factor` and `offset`.
//
// An array is seen as x[rows][features][inner]; row r belongs to group (r / span) % groups. Features last is inner = 1;
// a whole batch is groups = 1; where groups do not divide the samples (rows / span), the first have one more.
// Arithmetic on single values is in float (in double for arrays of double), sums are carried in double beyond short
// runs.
#pragma once

#include <cstdint>
#include <cstring>

namespace batchnorm {

enum class Type : int { float32, float64, float16, bfloat16 };

[[gnu::always_inline]] inline int64_t size_of(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
}

struct View {
  int64_t rows, groups, span, features, inner;
  // Whether each group has parameters of its own. Then groups are no virtual batches, but feature axes that other axes
  // lie behind.
  bool grouped_parameters = false;
  // Whether such groups are whole batches of their own, each with its own weights.
  bool grouped_weights = false;

  // Inlined always, as the functions of Values below.
  [[gnu::always_inline]] int64_t size() const { return rows * features * inner; }
  [[gnu::always_inline]] int64_t bytes(Type type) const { return size() * size_of(type); }
  [[gnu::always_inline]] int64_t statistics() const { return groups * features; }
  [[gnu::always_inline]] int64_t parameters() const { return grouped_parameters ? groups * features : features; }
  [[gnu::always_inline]] bool shares_weights() const { return grouped_parameters && !grouped_weights; }
  [[gnu::always_inline]] int64_t counts() const { return shares_weights() ? 1 : groups; }
  [[gnu::always_inline]] int64_t virtual_batches() const { return grouped_parameters ? 1 : groups; }
  [[gnu::always_inline]] int64_t group_rows(int64_t group = 0) const {  // the first have the most
    if (groups < 1 || span < 1) return 0;
    int64_t samples = rows / span;
    return (samples / groups + (group < samples % groups)) * span;
  }
  [[gnu::always_inline]] bool uneven() const { return group_rows(groups - 1) != group_rows(); }
  // What weights are for.
  [[gnu::always_inline]] int64_t positions() const { return (shares_weights() ? group_rows() : rows) * inner; }
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

// How much each position counts, [rows][inner], or [rows of a group][inner] where groups share them; null stands for 1
// everywhere. What is not above 0 counts nothing, and is never read into a sum.
struct Weights {
  enum Kind : int { bytes, floats, doubles };
  const void* data = nullptr;
  Kind kind = bytes;    // of bytes all but 0 are 1
  bool zeroed = false;  // whether what counts nothing becomes 0 in y and dx, and is not read in dy

  explicit operator bool() const { return data != nullptr; }
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
  Weights weights{};
  Values count{}, square_count{};  // out, or absent: sums of weights and of their squares, [counts]
  bool measured = false;  // whether the moments are given, those of replicas together: in, and no count goes out
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
  Weights weights{};
  Values count{};  // with weights that of the forward pass, else absent
};

// The four passes by themselves, with statistics and coefficients [groups][features].
struct Moments {
  Type type;
  View view;
  const void* x;
  Values mean, variance;  // out
  Weights weights{};
  Values count{}, square_count{};  // out, or absent: as of a forward pass
};
struct Normalize {  // y = scale·(x − mean) + offset
  Type type;
  View view;
  const void* x;
  void* y;
  Values mean, scale, offset;
  Weights weights{};
};
struct GradientSums {  // of dy, and of dy·(x − mean), where x − mean is 0 for what counts nothing
  Type type;
  View view;
  const void *x, *dy;
  Values mean;
  Values dy_sum, dy_centered_sum;  // out
  Weights weights{};
};
struct GradientCombine {  // dx = a·dy + w·(b·(x − mean) + c); dx may lie where dy does
  Type type;
  View view;
  const void *x, *dy;
  void* dx;
  Values mean, a, b, c;
  Weights weights{};
};

// The step of the moving averages after a forward pass, each moved by its weight of the new value: to the groups' mean
// of the means and of the variances, by their counts. With renorm its averages move to the mean and to sigma, and the
// running variance is that of a standard deviation that moves to sigma: the one given, or else its own. Where there is
// nothing, nothing moves. Returns whether anything has.
struct Averages {
  View view;
  Values mean, variance;       // of the forward pass
  Values count, square_count;  // of the forward pass with weights, else absent
  bool unbiased;        // whether the running variance moves to n/(n − 1) of each group's, n = count²/square_count
  bool skip_nonfinite;  // whether a parameter keeps its averages whose mean or variance is not finite
  Values running_mean, running_variance, running_stddev;  // in and out, or absent
  double momentum, epsilon;
  Values renorm_mean, renorm_stddev;  // in and out, or absent
  double renorm_momentum;
};
bool track(const Averages& averages);

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
