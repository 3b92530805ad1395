// The kernels for Python. What a call needs is by keyword, so that no two arrays are swapped unseen.
//
// Array methods take anything that exchanges arrays through the buffer protocol or DLPack, and check everything, so
// that no call reads or writes outside of an array. The methods by address are for arrays that take longer to exchange
// than small batches take to normalize: they check what an address can tell, and trust their caller with the rest.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "boundary.hpp"
#include "kernels.hpp"
#include "processors.hpp"
#include "replicas.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

using In = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }
[[noreturn]] void refuse_type(const std::string& message) { throw nb::type_error(message.c_str()); }

constexpr const char* TYPES[] = {"float32", "float64", "float16", "bfloat16"};

Type type_named(const std::string& name) {
  for (int i = 0; i < 4; i++)
    if (name == TYPES[i]) return static_cast<Type>(i);
  refuse("dtype must be float32, float64, float16 or bfloat16; received " + name);
}

int thread_count(int64_t threads) {
  if (threads < 1) refuse("threads must be at least 1; received " + std::to_string(threads));
  return static_cast<int>(threads < INT_MAX ? threads : INT_MAX);
}

// bfloat16 has no code in the buffer protocol, so its arrays come as unsigned 16-bit integers.
nb::dlpack::dtype element_of(Type type) {
  switch (type) {
    case Type::float32: return nb::dtype<float>();
    case Type::float64: return nb::dtype<double>();
    case Type::float16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    default: return nb::dtype<uint16_t>();
  }
}

// GOMP_parallel of the process, where a caller has found it.
OpenMP openmp = nullptr;

// How arrays are seen, of which type, with which epsilon; checked once.
struct Kernel {
  View view;
  Type type;
  double epsilon;

  Kernel(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool grouped_parameters,
         const std::string& dtype, double epsilon)
      : view{rows, groups, span, features, inner, grouped_parameters}, type(type_named(dtype)), epsilon(epsilon) {
    if (const char* wrong = fault(view)) refuse(wrong);
    if (!(epsilon >= 0) || std::isinf(epsilon)) refuse("epsilon must be finite and at least 0");
  }

  bool doubles() const { return type == Type::float64; }  // what statistics are by address

  template <class Operation>
  Operation operation() const {
    Operation p{};
    p.view = view;
    p.type = type;
    return p;
  }
};

// ---- By arrays.

// Collects what a call reads and writes, and refuses outputs that overlap anything.
class Checked {
 public:
  explicit Checked(const Kernel& kernel) : kernel_(kernel) {}

  const void* values(const In& array, const char* name) {
    shape(array, name);
    note(extent(array));
    return array.data();
  }
  void* written_values(const Out& array, const char* name) {
    shape(array, name);
    written(extent(array), name);
    return array.data();
  }
  Values numbers(const In& array, int64_t count, const char* name) {
    size(array, count, name);
    note(extent(array));
    return {const_cast<void*>(static_cast<const void*>(array.data())), doubles(array.dtype(), name)};
  }
  Values numbers(const std::optional<In>& array, int64_t count, const char* name) {
    return array ? numbers(*array, count, name) : Values{};
  }
  Weights weights(const std::optional<In>& mask, const std::optional<In>& weights, bool zeroed) {
    if (!mask && !weights) {
      if (zeroed) refuse("zeroed goes with mask or weights");
      return {};
    }
    if (mask && weights) refuse("mask and weights exclude each other");
    if (weights) {
      Values values = numbers(*weights, kernel_.view.positions(), "weights");
      return {values.data, values.doubles ? Weights::doubles : Weights::floats, zeroed};
    }
    if (mask->dtype() != nb::dtype<bool>() && mask->dtype() != nb::dtype<uint8_t>())
      refuse_type("mask must be bool or uint8");
    size(*mask, kernel_.view.positions(), "mask");
    note(extent(*mask));
    return {mask->data(), Weights::bytes, zeroed};
  }
  Values written_numbers(const Out& array, int64_t count, const char* name) {
    size(array, count, name);
    written(extent(array), name);
    return {array.data(), doubles(array.dtype(), name)};
  }
  Values written_numbers(const std::optional<Out>& array, int64_t count, const char* name) {
    return array ? written_numbers(*array, count, name) : Values{};
  }

 private:
  struct Extent {
    const char *begin, *end;
  };
  template <class Array>
  static Extent extent(const Array& array) {
    auto* begin = static_cast<const char*>(static_cast<const void*>(array.data()));
    return {begin, begin + array.nbytes()};
  }
  template <class Array>
  void shape(const Array& array, const char* name) {
    if (array.dtype() != element_of(kernel_.type))
      refuse_type(std::string(name) + " must be " + TYPES[static_cast<int>(kernel_.type)] +
                  (kernel_.type == Type::bfloat16 ? " as uint16" : ""));
    size(array, kernel_.view.size(), name);
  }
  template <class Array>
  static void size(const Array& array, int64_t expected, const char* name) {
    if (static_cast<int64_t>(array.size()) != expected)
      refuse(std::string(name) + " must have " + std::to_string(expected) + " elements; received " +
             std::to_string(array.size()));
    if (expected > 0 && array.data() == nullptr) refuse(std::string(name) + " has no memory");
  }
  static bool doubles(nb::dlpack::dtype type, const char* name) {
    if (type == nb::dtype<double>()) return true;
    if (type == nb::dtype<float>()) return false;
    refuse_type(std::string(name) + " must be float32 or float64");
  }
  void note(Extent extent) {
    if (count_ == LIMIT) refuse("a call has too many arrays");
    noted_[count_++] = extent;
  }
  void written(Extent extent, const char* name) {
    for (int i = 0; i < count_; i++)
      if (extent.begin < noted_[i].end && noted_[i].begin < extent.end)
        refuse(std::string(name) + " must not overlap another array");
    note(extent);
  }

  static constexpr int LIMIT = 24;  // arrays of a call
  const Kernel& kernel_;
  Extent noted_[LIMIT];
  int count_ = 0;
};

// Leaves the interpreter to other threads while it lives. A daemon thread that comes back when the program is ending is
// unwound by Python, up to 3.13. That must not reach code that cannot be unwound, or the process aborts; so the thread
// waits for the end of the process here, as it does by itself from 3.14 on.
class Released {
 public:
  Released() = default;
  Released(const Released&) = delete;
  ~Released() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

template <class Operation>
void call(void (*operation)(const Operation&), const Operation& p) {
  Released released;
  operation(p);
}

void forward(const Kernel& kernel, const In& x, const Out& y, const Out& mean, const Out& variance,
             const std::optional<In>& factor, const std::optional<In>& offset, const std::optional<In>& renorm_mean,
             const std::optional<In>& renorm_stddev, const std::optional<Out>& r, const std::optional<Out>& d,
             double rmin, double rmax, double dmax, const std::optional<In>& mask, const std::optional<In>& weights,
             bool zeroed, const std::optional<Out>& count, const std::optional<Out>& square_count) {
  bool renorm = renorm_mean.has_value();
  if (renorm_stddev.has_value() != renorm || r.has_value() != renorm || d.has_value() != renorm)
    refuse("renorm_mean, renorm_stddev, r and d must be given together");
  int64_t parameters = kernel.view.parameters(), statistics = kernel.view.statistics();
  Checked checked(kernel);
  auto p = kernel.operation<Forward>();
  p.epsilon = kernel.epsilon;
  p.x = checked.values(x, "x");
  p.factor = checked.numbers(factor, parameters, "factor");
  p.offset = checked.numbers(offset, parameters, "offset");
  p.renorm_mean = checked.numbers(renorm_mean, parameters, "renorm_mean");
  p.renorm_stddev = checked.numbers(renorm_stddev, parameters, "renorm_stddev");
  p.rmin = rmin;
  p.rmax = rmax;
  p.dmax = dmax;
  p.weights = checked.weights(mask, weights, zeroed);
  p.y = checked.written_values(y, "y");
  p.mean = checked.written_numbers(mean, statistics, "mean");
  p.variance = checked.written_numbers(variance, statistics, "variance");
  p.count = checked.written_numbers(count, kernel.view.virtual_batches(), "count");
  p.square_count = checked.written_numbers(square_count, kernel.view.virtual_batches(), "square_count");
  p.r = checked.written_numbers(r, parameters, "r");
  p.d = checked.written_numbers(d, parameters, "d");
  call(kernels().forward, p);
}

// What averages move after a forward pass, but for where they lie.
Averages averages_of(const Kernel& kernel, double momentum, bool unbiased, bool skip_nonfinite,
                     double renorm_momentum) {
  Averages averages{};
  averages.view = kernel.view;
  averages.momentum = momentum;
  averages.unbiased = unbiased;
  averages.skip_nonfinite = skip_nonfinite;
  averages.epsilon = kernel.epsilon;
  averages.renorm_momentum = renorm_momentum;
  return averages;
}

bool move_averages(const Kernel& kernel, const In& mean, const In& variance, const std::optional<Out>& running_mean,
                   const std::optional<Out>& running_variance, const std::optional<Out>& running_stddev,
                   const std::optional<Out>& renorm_mean, const std::optional<Out>& renorm_stddev, double momentum,
                   bool unbiased, bool skip_nonfinite, double renorm_momentum, const std::optional<In>& count,
                   const std::optional<In>& square_count) {
  if (count.has_value() != square_count.has_value()) refuse("count and square_count go together");
  if (renorm_mean.has_value() != renorm_stddev.has_value()) refuse("renorm_mean and renorm_stddev go together");
  if (running_stddev && !(renorm_mean && running_variance))
    refuse("running_stddev goes with renorm_mean, renorm_stddev and running_variance");
  int64_t parameters = kernel.view.parameters(), statistics = kernel.view.statistics();
  Checked checked(kernel);
  Averages averages = averages_of(kernel, momentum, unbiased, skip_nonfinite, renorm_momentum);
  averages.mean = checked.numbers(mean, statistics, "mean");
  averages.variance = checked.numbers(variance, statistics, "variance");
  averages.count = checked.numbers(count, kernel.view.virtual_batches(), "count");
  averages.square_count = checked.numbers(square_count, kernel.view.virtual_batches(), "square_count");
  averages.running_mean = checked.written_numbers(running_mean, parameters, "running_mean");
  averages.running_variance = checked.written_numbers(running_variance, parameters, "running_variance");
  averages.running_stddev = checked.written_numbers(running_stddev, parameters, "running_stddev");
  averages.renorm_mean = checked.written_numbers(renorm_mean, parameters, "renorm_mean");
  averages.renorm_stddev = checked.written_numbers(renorm_stddev, parameters, "renorm_stddev");
  return track(averages);
}

void backward(const Kernel& kernel, const In& x, const In& dy, const Out& dx, const In& mean, const In& variance,
              const std::optional<In>& factor, const std::optional<In>& r, const std::optional<In>& d,
              const std::optional<Out>& dfactor, const std::optional<Out>& doffset, const std::optional<In>& mask,
              const std::optional<In>& weights, bool zeroed, const std::optional<In>& count) {
  if (r.has_value() != d.has_value()) refuse("r and d must be given together");
  int64_t parameters = kernel.view.parameters(), statistics = kernel.view.statistics();
  Checked checked(kernel);
  auto p = kernel.operation<Backward>();
  p.epsilon = kernel.epsilon;
  p.x = checked.values(x, "x");
  p.dy = checked.values(dy, "dy");
  p.mean = checked.numbers(mean, statistics, "mean");
  p.variance = checked.numbers(variance, statistics, "variance");
  p.factor = checked.numbers(factor, parameters, "factor");
  p.r = checked.numbers(r, parameters, "r");
  p.d = checked.numbers(d, parameters, "d");
  p.weights = checked.weights(mask, weights, zeroed);
  if (count.has_value() != (mask || weights)) refuse("count goes with mask or weights");
  p.count = checked.numbers(count, kernel.view.virtual_batches(), "count");
  p.dx = checked.written_values(dx, "dx");
  p.dfactor = checked.written_numbers(dfactor, parameters, "dfactor");
  p.doffset = checked.written_numbers(doffset, parameters, "doffset");
  call(kernels().backward, p);
}

void moments(const Kernel& kernel, const In& x, const Out& mean, const Out& variance, const std::optional<In>& mask,
             const std::optional<In>& weights) {
  Checked checked(kernel);
  auto p = kernel.operation<Moments>();
  p.x = checked.values(x, "x");
  p.weights = checked.weights(mask, weights, false);
  p.mean = checked.written_numbers(mean, kernel.view.statistics(), "mean");
  p.variance = checked.written_numbers(variance, kernel.view.statistics(), "variance");
  call(kernels().moments, p);
}

void normalize(const Kernel& kernel, const In& x, const Out& y, const In& mean, const In& scale, const In& offset,
               const std::optional<In>& mask, const std::optional<In>& weights, bool zeroed) {
  Checked checked(kernel);
  auto p = kernel.operation<Normalize>();
  p.x = checked.values(x, "x");
  p.weights = checked.weights(mask, weights, zeroed);
  p.mean = checked.numbers(mean, kernel.view.statistics(), "mean");
  p.scale = checked.numbers(scale, kernel.view.statistics(), "scale");
  p.offset = checked.numbers(offset, kernel.view.statistics(), "offset");
  p.y = checked.written_values(y, "y");
  call(kernels().normalize, p);
}

void gradient_sums(const Kernel& kernel, const In& x, const In& dy, const In& mean, const Out& dy_sum,
                   const Out& dy_centered_sum, const std::optional<In>& mask, const std::optional<In>& weights,
                   bool zeroed) {
  Checked checked(kernel);
  auto p = kernel.operation<GradientSums>();
  p.x = checked.values(x, "x");
  p.weights = checked.weights(mask, weights, zeroed);
  p.dy = checked.values(dy, "dy");
  p.mean = checked.numbers(mean, kernel.view.statistics(), "mean");
  p.dy_sum = checked.written_numbers(dy_sum, kernel.view.statistics(), "dy_sum");
  p.dy_centered_sum = checked.written_numbers(dy_centered_sum, kernel.view.statistics(), "dy_centered_sum");
  call(kernels().gradient_sums, p);
}

void gradient_combine(const Kernel& kernel, const In& x, const In& dy, const Out& dx, const In& mean, const In& a,
                      const In& b, const In& c, const std::optional<In>& mask, const std::optional<In>& weights,
                      bool zeroed) {
  Checked checked(kernel);
  auto p = kernel.operation<GradientCombine>();
  p.x = checked.values(x, "x");
  p.weights = checked.weights(mask, weights, zeroed);
  p.dy = checked.values(dy, "dy");
  p.mean = checked.numbers(mean, kernel.view.statistics(), "mean");
  p.a = checked.numbers(a, kernel.view.statistics(), "a");
  p.b = checked.numbers(b, kernel.view.statistics(), "b");
  p.c = checked.numbers(c, kernel.view.statistics(), "c");
  p.dx = checked.written_values(dx, "dx");
  call(kernels().gradient_combine, p);
}

// ---- By address, 0 for what is absent. Arrays are of the kernel's type, numbers by feature double where that is
// double and float elsewhere; moments are always double, for a float that holds a mean loses what the gradient wants.

void* address(uintptr_t value, bool needed, const char* name) {
  if (needed && value == 0) refuse(std::string(name) + " has no memory");
  return reinterpret_cast<void*>(value);
}
Values numbers_at(const Kernel& kernel, uintptr_t value, bool needed, const char* name) {
  return {address(value, needed, name), kernel.doubles()};
}
Values moments_at(uintptr_t value, const char* name) { return {address(value, true, name), true}; }

Weights weights_at(const Kernel& kernel, uintptr_t mask, uintptr_t weights, bool zeroed) {
  if (mask && weights) refuse("mask and weights exclude each other");
  if (zeroed && !mask && !weights) refuse("zeroed goes with mask or weights");
  auto kind = mask ? Weights::bytes : kernel.doubles() ? Weights::doubles : Weights::floats;
  return {reinterpret_cast<const void*>(mask ? mask : weights), kind, zeroed};
}

Team team_of(int64_t threads) { return Team(openmp, thread_count(threads)); }

// What replicas add up; of whole batches. See replicas.hpp.
Totals totals_of(const Kernel& kernel, uintptr_t totals) {
  if (kernel.view.virtual_batches() != 1) refuse("totals must be of a whole batch");
  return Totals(kernel.view, address(totals, true, "totals"));
}

// Returns whether an average has moved, or none was to.
bool forward_at(const Kernel& kernel, int64_t threads, uintptr_t x, uintptr_t y, uintptr_t mean, uintptr_t variance,
                uintptr_t factor, uintptr_t offset, uintptr_t renorm_mean, uintptr_t renorm_stddev, uintptr_t r,
                uintptr_t d, double rmin, double rmax, double dmax, uintptr_t running_mean, uintptr_t running_variance,
                double momentum, bool unbiased, bool skip_nonfinite, double renorm_momentum, uintptr_t mask,
                uintptr_t weights, bool zeroed, uintptr_t count, uintptr_t square_count, uintptr_t totals) {
  bool values = kernel.view.size() > 0, renorm = renorm_mean || renorm_stddev || r || d;
  auto p = kernel.operation<Forward>();
  p.epsilon = kernel.epsilon;
  p.x = address(x, values, "x");
  p.y = address(y, values, "y");
  p.mean = moments_at(mean, "mean");
  p.variance = moments_at(variance, "variance");
  p.factor = numbers_at(kernel, factor, false, "factor");
  p.offset = numbers_at(kernel, offset, false, "offset");
  p.renorm_mean = numbers_at(kernel, renorm_mean, renorm, "renorm_mean");
  p.renorm_stddev = numbers_at(kernel, renorm_stddev, renorm, "renorm_stddev");
  p.r = numbers_at(kernel, r, renorm, "r");
  p.d = numbers_at(kernel, d, renorm, "d");
  p.rmin = rmin;
  p.rmax = rmax;
  p.dmax = dmax;
  Averages averages = averages_of(kernel, momentum, unbiased, skip_nonfinite, renorm_momentum);
  p.weights = weights_at(kernel, mask, weights, zeroed);
  bool weighed = static_cast<bool>(p.weights) || totals;
  averages.mean = p.mean;
  averages.variance = p.variance;
  averages.count = p.count = numbers_at(kernel, count, weighed, "count");
  averages.square_count = p.square_count = numbers_at(kernel, square_count, weighed, "square_count");
  averages.running_mean = numbers_at(kernel, running_mean, false, "running_mean");
  averages.running_variance = numbers_at(kernel, running_variance, false, "running_variance");
  averages.renorm_mean = p.renorm_mean;
  averages.renorm_stddev = p.renorm_stddev;
  Team team = team_of(threads);
  if (totals) {
    p.measured = true;
    totals_of(kernel, totals).to_moments(p);
  }
  Released released;
  kernels().forward(p);
  return (!running_mean && !running_variance && !(renorm && renorm_momentum != 0)) || track(averages);
}

void backward_at(const Kernel& kernel, int64_t threads, uintptr_t x, uintptr_t dy, uintptr_t dx, uintptr_t mean,
                 uintptr_t variance, uintptr_t factor, uintptr_t r, uintptr_t d, uintptr_t dfactor, uintptr_t doffset,
                 uintptr_t mask, uintptr_t weights, bool zeroed, uintptr_t count) {
  bool values = kernel.view.size() > 0, renorm = r || d;
  auto p = kernel.operation<Backward>();
  p.epsilon = kernel.epsilon;
  p.x = address(x, values, "x");
  p.dy = address(dy, values, "dy");
  p.dx = address(dx, values, "dx");
  p.mean = moments_at(mean, "mean");
  p.variance = moments_at(variance, "variance");
  p.factor = numbers_at(kernel, factor, false, "factor");
  p.r = numbers_at(kernel, r, renorm, "r");
  p.d = numbers_at(kernel, d, renorm, "d");
  p.dfactor = numbers_at(kernel, dfactor, false, "dfactor");
  p.doffset = numbers_at(kernel, doffset, false, "doffset");
  p.weights = weights_at(kernel, mask, weights, zeroed);
  p.count = numbers_at(kernel, count, static_cast<bool>(p.weights), "count");
  Team team = team_of(threads);
  call(kernels().backward, p);
}

// Around the sums over replicas.

void totals_at(const Kernel& kernel, int64_t threads, uintptr_t x, uintptr_t totals, uintptr_t mask,
               uintptr_t weights) {
  Totals t = totals_of(kernel, totals);
  auto p = kernel.operation<Moments>();
  p.x = address(x, kernel.view.size() > 0, "x");
  p.mean = {t.first, true};
  p.variance = {t.second, true};
  p.count = {t.count, true};
  p.square_count = {t.square_count, true};
  p.weights = weights_at(kernel, mask, weights, false);
  Team team = team_of(threads);
  call(kernels().moments, p);
  t.from_moments();
}

Replica replica_of(const Kernel& kernel, uintptr_t mean, uintptr_t variance, uintptr_t count, uintptr_t factor,
                   uintptr_t r, uintptr_t d) {
  bool renorm = r || d;
  return {kernel.doubles(),
          kernel.epsilon,
          moments_at(mean, "mean"),
          moments_at(variance, "variance"),
          numbers_at(kernel, count, true, "count"),
          numbers_at(kernel, factor, false, "factor"),
          numbers_at(kernel, r, renorm, "r"),
          numbers_at(kernel, d, renorm, "d")};
}

void totals_gradient_at(const Kernel& kernel, int64_t threads, uintptr_t x, uintptr_t dy, uintptr_t mean,
                        uintptr_t variance, uintptr_t count, uintptr_t factor, uintptr_t r, uintptr_t d,
                        uintptr_t totals, uintptr_t dfactor, uintptr_t doffset, uintptr_t mask, uintptr_t weights,
                        bool zeroed) {
  bool values = kernel.view.size() > 0;
  Totals t = totals_of(kernel, totals);
  Replica replica = replica_of(kernel, mean, variance, count, factor, r, d);
  auto p = kernel.operation<GradientSums>();
  p.x = address(x, values, "x");
  p.dy = address(dy, values, "dy");
  p.mean = replica.mean;
  p.dy_sum = {t.first, true};
  p.dy_centered_sum = {t.second, true};
  p.weights = weights_at(kernel, mask, weights, zeroed);
  Team team = team_of(threads);
  call(kernels().gradient_sums, p);
  replica.to_gradient(t, numbers_at(kernel, dfactor, false, "dfactor"), numbers_at(kernel, doffset, false, "doffset"));
}

void totals_combine_at(const Kernel& kernel, int64_t threads, uintptr_t x, uintptr_t dy, uintptr_t dx, uintptr_t mean,
                       uintptr_t variance, uintptr_t count, uintptr_t factor, uintptr_t r, uintptr_t d,
                       uintptr_t totals, uintptr_t mask, uintptr_t weights, bool zeroed) {
  bool values = kernel.view.size() > 0;
  Totals t = totals_of(kernel, totals);
  Replica replica = replica_of(kernel, mean, variance, count, factor, r, d);
  auto p = kernel.operation<GradientCombine>();
  p.x = address(x, values, "x");
  p.dy = address(dy, values, "dy");
  p.dx = address(dx, values, "dx");
  p.mean = replica.mean;
  p.weights = weights_at(kernel, mask, weights, zeroed);
  Team team = team_of(threads);
  std::vector<double> a(static_cast<size_t>(t.features)), b(a), c(a);
  replica.to_map(t, a.data(), b.data(), c.data());
  p.a = {a.data(), true};
  p.b = {b.data(), true};
  p.c = {c.data(), true};
  call(kernels().gradient_combine, p);
}

std::string representation(const Kernel& k) {
  auto number = [](int64_t n) { return std::to_string(n); };
  return "Kernel(rows=" + number(k.view.rows) + ", groups=" + number(k.view.groups) + ", span=" + number(k.view.span) +
         ", features=" + number(k.view.features) + ", inner=" + number(k.view.inner) +
         ", grouped_parameters=" + (k.view.grouped_parameters ? "True" : "False") + ", dtype='" +
         TYPES[static_cast<int>(k.type)] + "', epsilon=" + nb::cast<std::string>(nb::repr(nb::float_(k.epsilon))) + ")";
}

}  // namespace

NB_MODULE(_cpu, m) {
  using nb::arg;
  constexpr double INFINITE = std::numeric_limits<double>::infinity();
  auto array = [](const char* name) { return arg(name).noconvert(); };
  auto optional = [](const char* name) { return arg(name).noconvert().none() = nb::none(); };
  auto absent = [](const char* name) { return arg(name) = 0; };
  nb::set_leak_warnings(false);  // caches keep kernels to the end of the program
  m.doc() = "Batch normalization of contiguous arrays seen as (rows, features, inner); see csrc/kernels.hpp.";

  nb::class_<Kernel>(m, "Kernel", "The kernels for arrays that are seen in one way, of one type, with one epsilon.")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, bool, const std::string&, double>(), nb::kw_only(),
           arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"), arg("grouped_parameters"),
           arg("dtype"), arg("epsilon"))
      .def("__repr__", &representation)
      .def_prop_ro("rows", [](const Kernel& k) { return k.view.rows; })
      .def_prop_ro("groups", [](const Kernel& k) { return k.view.groups; })
      .def_prop_ro("span", [](const Kernel& k) { return k.view.span; })
      .def_prop_ro("features", [](const Kernel& k) { return k.view.features; })
      .def_prop_ro("inner", [](const Kernel& k) { return k.view.inner; })
      .def_prop_ro("grouped_parameters", [](const Kernel& k) { return k.view.grouped_parameters; })
      .def_prop_ro("dtype", [](const Kernel& k) { return TYPES[static_cast<int>(k.type)]; })
      .def_prop_ro("statistics_dtype", [](const Kernel& k) { return k.doubles() ? "float64" : "float32"; })
      .def_prop_ro("epsilon", [](const Kernel& k) { return k.epsilon; })
      .def_prop_ro("size", [](const Kernel& k) { return k.view.size(); })
      .def_prop_ro("parameters", [](const Kernel& k) { return k.view.parameters(); })
      .def_prop_ro("statistics", [](const Kernel& k) { return k.view.statistics(); })
      .def_prop_ro("positions", [](const Kernel& k) { return k.view.positions(); })
      .def_prop_ro("virtual_batches", [](const Kernel& k) { return k.view.virtual_batches(); })
      .def("forward", &forward, nb::kw_only(), array("x"), array("y"), array("mean"), array("variance"),
           optional("factor"), optional("offset"), optional("renorm_mean"), optional("renorm_stddev"), optional("r"),
           optional("d"), arg("rmin") = -INFINITE, arg("rmax") = INFINITE, arg("dmax") = INFINITE, optional("mask"),
           optional("weights"), arg("zeroed") = false, optional("count"), optional("square_count"))
      .def("move_averages", &move_averages, nb::kw_only(), array("mean"), array("variance"), optional("running_mean"),
           optional("running_variance"), optional("running_stddev"), optional("renorm_mean"), optional("renorm_stddev"),
           arg("momentum"), arg("unbiased") = false, arg("skip_nonfinite") = false, arg("renorm_momentum") = 0.0,
           optional("count"), optional("square_count"))
      .def("backward", &backward, nb::kw_only(), array("x"), array("dy"), array("dx"), array("mean"), array("variance"),
           optional("factor"), optional("r"), optional("d"), optional("dfactor"), optional("doffset"), optional("mask"),
           optional("weights"), arg("zeroed") = false, optional("count"))
      .def("moments", &moments, nb::kw_only(), array("x"), array("mean"), array("variance"), optional("mask"),
           optional("weights"))
      .def("normalize", &normalize, nb::kw_only(), array("x"), array("y"), array("mean"), array("scale"),
           array("offset"), optional("mask"), optional("weights"), arg("zeroed") = false)
      .def("gradient_sums", &gradient_sums, nb::kw_only(), array("x"), array("dy"), array("mean"), array("dy_sum"),
           array("dy_centered_sum"), optional("mask"), optional("weights"), arg("zeroed") = false)
      .def("gradient_combine", &gradient_combine, nb::kw_only(), array("x"), array("dy"), array("dx"), array("mean"),
           array("a"), array("b"), array("c"), optional("mask"), optional("weights"), arg("zeroed") = false)
      .def("forward_at", &forward_at, nb::kw_only(), arg("threads"), arg("x"), arg("y"), arg("mean"), arg("variance"),
           absent("factor"), absent("offset"), absent("renorm_mean"), absent("renorm_stddev"), absent("r"), absent("d"),
           arg("rmin") = -INFINITE, arg("rmax") = INFINITE, arg("dmax") = INFINITE, absent("running_mean"),
           absent("running_variance"), arg("momentum") = 0.0, arg("unbiased") = false, arg("skip_nonfinite") = false,
           arg("renorm_momentum") = 0.0, absent("mask"), absent("weights"), arg("zeroed") = false, absent("count"),
           absent("square_count"), absent("totals"))
      .def("totals_at", &totals_at, nb::kw_only(), arg("threads"), arg("x"), arg("totals"), absent("mask"),
           absent("weights"))
      .def("totals_gradient_at", &totals_gradient_at, nb::kw_only(), arg("threads"), arg("x"), arg("dy"), arg("mean"),
           arg("variance"), arg("count"), absent("factor"), absent("r"), absent("d"), arg("totals"), absent("dfactor"),
           absent("doffset"), absent("mask"), absent("weights"), arg("zeroed") = false)
      .def("totals_combine_at", &totals_combine_at, nb::kw_only(), arg("threads"), arg("x"), arg("dy"), arg("dx"),
           arg("mean"), arg("variance"), arg("count"), absent("factor"), absent("r"), absent("d"), arg("totals"),
           absent("mask"), absent("weights"), arg("zeroed") = false)
      .def("backward_at", &backward_at, nb::kw_only(), arg("threads"), arg("x"), arg("dy"), arg("dx"), arg("mean"),
           arg("variance"), absent("factor"), absent("r"), absent("d"), absent("dfactor"), absent("doffset"),
           absent("mask"), absent("weights"), arg("zeroed") = false, absent("count"));

  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", [](int64_t threads) { set_num_threads(thread_count(threads)); }, arg("threads"));
  m.def("processors", [](const std::string& root) { return processors(root); }, arg("root") = "");
  m.def("use_openmp", [](uintptr_t address) { openmp = reinterpret_cast<OpenMP>(address); }, arg("address"));
}
