// The operations for Python, over anything that exchanges arrays through the buffer protocol or DLPack. Everything is
// checked here, so that no call reads or writes outside of an array.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <climits>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "normalize.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace batchnorm;

namespace {

using In = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

// bfloat16 has no code in the buffer protocol, so its arrays come as unsigned 16-bit integers.
Type type_of(nb::dlpack::dtype type, const char* name) {
  if (type == nb::dtype<float>()) return Type::float32;
  if (type == nb::dtype<double>()) return Type::float64;
  if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16 && type.lanes == 1)
    return Type::float16;
  if (type == nb::dtype<uint16_t>()) return Type::bfloat16;
  throw nb::type_error((std::string(name) + " must be float16, float32, float64, or bfloat16 as uint16").c_str());
}

// Whether sizes can be told in bytes without overflow.
bool countable(const View& v) {
  constexpr int64_t LARGEST = INT64_MAX / 64;
  int64_t values, statistics;
  return !__builtin_mul_overflow(v.rows > 1 ? v.rows : 1, v.features, &values) &&
         !__builtin_mul_overflow(values, v.inner, &values) && values <= LARGEST &&
         !__builtin_mul_overflow(v.groups, v.features, &statistics) && statistics <= LARGEST;
}

struct Extent {
  const char *begin, *end;
};
template <class Array>
Extent extent(const Array& array) {
  auto* begin = static_cast<const char*>(static_cast<const void*>(array.data()));
  return {begin, begin + array.nbytes()};
}

// Collects what a call reads and writes, and refuses outputs that overlap anything.
class Checked {
 public:
  Checked(const In& x, int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own)
      : type(type_of(x.dtype(), "x")), view{rows, groups, span, features, inner, own} {
    if (rows < 0 || groups < 1 || span < 1 || features < 1 || inner < 1)
      refuse("view must have rows >= 0, and groups, span, features and inner >= 1");
    if (!countable(view)) refuse("view must have fewer than 2**57 values and statistics");
    if (rows % groups || (rows / groups) % span)
      refuse("rows must be a multiple of groups * span");
    data_ = x.dtype();
    read(x, "x");
  }

  const void* values(const In& array, const char* name) {
    if (array.dtype() != data_) throw nb::type_error((std::string(name) + " must be of the type of x").c_str());
    read(array, name);
    return array.data();
  }
  void* written_values(const Out& array, const char* name) {
    if (array.dtype() != data_) throw nb::type_error((std::string(name) + " must be of the type of x").c_str());
    size(array.size(), view.size(), name);
    written(extent(array), name);
    return array.data();
  }
  Values statistics(const In& array, int64_t count, const char* name) {
    size(array.size(), count, name);
    note(extent(array));
    return {const_cast<void*>(static_cast<const void*>(array.data())), wide(array.dtype(), name)};
  }
  Values statistics(const std::optional<In>& array, int64_t count, const char* name) {
    return array ? statistics(*array, count, name) : Values{};
  }
  Values written_statistics(const Out& array, int64_t count, const char* name) {
    size(array.size(), count, name);
    written(extent(array), name);
    return {array.data(), wide(array.dtype(), name)};
  }
  Values written_statistics(const std::optional<Out>& array, int64_t count, const char* name) {
    return array ? written_statistics(*array, count, name) : Values{};
  }

  Type type;
  View view;

 private:
  void read(const In& array, const char* name) {
    size(array.size(), view.size(), name);
    note(extent(array));
  }
  static void size(size_t found, int64_t expected, const char* name) {
    if (static_cast<int64_t>(found) != expected)
      refuse(std::string(name) + " must have " + std::to_string(expected) + " elements; received " +
             std::to_string(found));
  }
  static bool wide(nb::dlpack::dtype type, const char* name) {
    if (type == nb::dtype<double>()) return true;
    if (type == nb::dtype<float>()) return false;
    throw nb::type_error((std::string(name) + " must be float32 or float64").c_str());
  }
  void note(Extent one) {
    if (count_ < LIMIT) seen_[count_++] = one;
  }
  void written(Extent one, const char* name) {
    for (int i = 0; i < count_; i++)
      if (one.begin < seen_[i].end && seen_[i].begin < one.end)
        refuse(std::string(name) + " must not overlap another array");
    note(one);
  }

  static constexpr int LIMIT = 20;
  nb::dlpack::dtype data_;
  Extent seen_[LIMIT];
  int count_ = 0;
};

template <class P>
void call(void (*operation)(const P&), const P& p) {
  nb::gil_scoped_release release;
  operation(p);
}

void forward(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own,
             const In& x, const Out& y,
             double epsilon, const std::optional<In>& gamma, const std::optional<In>& beta,
             const std::optional<In>& adjustment_scale, const std::optional<In>& adjustment_bias,
             const std::optional<In>& renorm_mean, const std::optional<In>& renorm_stddev, double rmin, double rmax,
             double dmax, const Out& mean, const Out& variance, const std::optional<Out>& r,
             const std::optional<Out>& d) {
  Checked checked(x, rows, groups, span, features, inner, own);
  int64_t parameters = checked.view.parameters();
  if (adjustment_scale.has_value() != adjustment_bias.has_value())
    refuse("adjustment_scale and adjustment_bias must be given together");
  bool renorm = renorm_mean.has_value();
  if (renorm_stddev.has_value() != renorm || r.has_value() != renorm || d.has_value() != renorm)
    refuse("renorm_mean, renorm_stddev, r and d must be given together");
  Forward p{};
  p.type = checked.type;
  p.view = checked.view;
  p.x = x.data();
  p.epsilon = epsilon;
  p.gamma = checked.statistics(gamma, parameters, "gamma");
  p.beta = checked.statistics(beta, parameters, "beta");
  p.adjustment_scale = checked.statistics(adjustment_scale, parameters, "adjustment_scale");
  p.adjustment_bias = checked.statistics(adjustment_bias, parameters, "adjustment_bias");
  p.renorm_mean = checked.statistics(renorm_mean, parameters, "renorm_mean");
  p.renorm_stddev = checked.statistics(renorm_stddev, parameters, "renorm_stddev");
  p.rmin = rmin;
  p.rmax = rmax;
  p.dmax = dmax;
  p.y = checked.written_values(y, "y");
  p.mean = checked.written_statistics(mean, groups * features, "mean");
  p.variance = checked.written_statistics(variance, groups * features, "variance");
  p.r = checked.written_statistics(r, parameters, "r");
  p.d = checked.written_statistics(d, parameters, "d");
  call(kernels().forward, p);
}

void backward(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own,
             const In& x, const In& dy,
              const Out& dx, double epsilon, const In& mean, const In& variance, const std::optional<In>& gamma,
              const std::optional<In>& r, const std::optional<In>& d, const std::optional<In>& adjustment_scale,
              const std::optional<In>& adjustment_bias, const std::optional<Out>& dgamma,
              const std::optional<Out>& dbeta, const std::optional<Out>& dadjustment_scale,
              const std::optional<Out>& dadjustment_bias) {
  Checked checked(x, rows, groups, span, features, inner, own);
  int64_t parameters = checked.view.parameters();
  if (adjustment_scale.has_value() != adjustment_bias.has_value())
    refuse("adjustment_scale and adjustment_bias must be given together");
  if (r.has_value() != d.has_value()) refuse("r and d must be given together");
  Backward p{};
  p.type = checked.type;
  p.view = checked.view;
  p.x = x.data();
  p.dy = checked.values(dy, "dy");
  p.epsilon = epsilon;
  p.mean = checked.statistics(mean, groups * features, "mean");
  p.variance = checked.statistics(variance, groups * features, "variance");
  p.gamma = checked.statistics(gamma, parameters, "gamma");
  p.r = checked.statistics(r, parameters, "r");
  p.d = checked.statistics(d, parameters, "d");
  p.adjustment_scale = checked.statistics(adjustment_scale, parameters, "adjustment_scale");
  p.adjustment_bias = checked.statistics(adjustment_bias, parameters, "adjustment_bias");
  p.dx = checked.written_values(dx, "dx");
  p.dgamma = checked.written_statistics(dgamma, parameters, "dgamma");
  p.dbeta = checked.written_statistics(dbeta, parameters, "dbeta");
  p.dadjustment_scale = checked.written_statistics(dadjustment_scale, parameters, "dadjustment_scale");
  p.dadjustment_bias = checked.written_statistics(dadjustment_bias, parameters, "dadjustment_bias");
  call(kernels().backward, p);
}

void moments(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own,
             const In& x,
             const Out& mean, const Out& variance) {
  Checked checked(x, rows, groups, span, features, inner, own);
  Moments p{checked.type, checked.view, x.data(), {}, {}};
  p.mean = checked.written_statistics(mean, groups * features, "mean");
  p.variance = checked.written_statistics(variance, groups * features, "variance");
  call(kernels().moments, p);
}

void scale_shift(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own,
             const In& x,
                 const Out& y, const In& scale, const In& shift) {
  Checked checked(x, rows, groups, span, features, inner, own);
  ScaleShift p{checked.type, checked.view, x.data(), nullptr, {}, {}};
  p.scale = checked.statistics(scale, groups * features, "scale");
  p.shift = checked.statistics(shift, groups * features, "shift");
  p.y = checked.written_values(y, "y");
  call(kernels().scale_shift, p);
}

void gradient_sums(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own,
             const In& x,
                   const In& dy, const In& mean, const Out& dy_sum, const Out& dy_centered_sum) {
  Checked checked(x, rows, groups, span, features, inner, own);
  GradientSums p{checked.type, checked.view, x.data(), checked.values(dy, "dy"), {}, {}, {}};
  p.mean = checked.statistics(mean, groups * features, "mean");
  p.dy_sum = checked.written_statistics(dy_sum, groups * features, "dy_sum");
  p.dy_centered_sum = checked.written_statistics(dy_centered_sum, groups * features, "dy_centered_sum");
  call(kernels().gradient_sums, p);
}

void gradient_combine(int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own,
             const In& x,
                      const In& dy, const Out& dx, const In& dy_weight, const In& x_weight, const In& constant) {
  Checked checked(x, rows, groups, span, features, inner, own);
  GradientCombine p{checked.type, checked.view, x.data(), checked.values(dy, "dy"), nullptr, {}, {}, {}};
  p.dy_weight = checked.statistics(dy_weight, groups * features, "dy_weight");
  p.x_weight = checked.statistics(x_weight, groups * features, "x_weight");
  p.constant = checked.statistics(constant, groups * features, "constant");
  p.dx = checked.written_values(dx, "dx");
  call(kernels().gradient_combine, p);
}

// The same by addresses, 0 for what is absent, for callers that have checked everything themselves: an array of x's
// type, and statistics of one type. For arrays that take longer to exchange than small batches take to normalize.
Values at(uintptr_t address, bool wide) { return {reinterpret_cast<void*>(address), wide}; }

// GOMP_parallel of the process, where a caller has found it.
OpenMP openmp = nullptr;

void forward_at(int threads, int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own, int type,
                bool wide, uintptr_t x, uintptr_t y, double epsilon, uintptr_t gamma, uintptr_t beta,
                uintptr_t adjustment_scale, uintptr_t adjustment_bias, uintptr_t renorm_mean, uintptr_t renorm_stddev,
                double rmin, double rmax, double dmax, uintptr_t mean, uintptr_t variance, uintptr_t r, uintptr_t d,
                uintptr_t running_mean, uintptr_t running_variance, double momentum, double bessel,
                double renorm_momentum) {
  Forward p{};
  p.type = static_cast<Type>(type);
  p.view = {rows, groups, span, features, inner, own};
  p.x = reinterpret_cast<const void*>(x);
  p.y = reinterpret_cast<void*>(y);
  p.epsilon = epsilon;
  p.gamma = at(gamma, wide);
  p.beta = at(beta, wide);
  p.adjustment_scale = at(adjustment_scale, wide);
  p.adjustment_bias = at(adjustment_bias, wide);
  p.renorm_mean = at(renorm_mean, wide);
  p.renorm_stddev = at(renorm_stddev, wide);
  p.rmin = rmin;
  p.rmax = rmax;
  p.dmax = dmax;
  p.mean = at(mean, wide);
  p.variance = at(variance, wide);
  p.r = at(r, wide);
  p.d = at(d, wide);
  Averages averages{p.view.parameters(), own ? 1 : groups, p.mean, p.variance, at(running_mean, wide),
                    at(running_variance, wide), momentum, bessel, epsilon, p.renorm_mean, p.renorm_stddev,
                    renorm_momentum};
  Team team(openmp, threads);
  nb::gil_scoped_release release;
  kernels().forward(p);
  if (running_mean || running_variance || (renorm_mean && renorm_momentum)) track(averages);
}

void backward_at(int threads, int64_t rows, int64_t groups, int64_t span, int64_t features, int64_t inner, bool own, int type,
                 bool wide, uintptr_t x, uintptr_t dy, uintptr_t dx, double epsilon, uintptr_t mean, uintptr_t variance,
                 uintptr_t gamma, uintptr_t r, uintptr_t d, uintptr_t adjustment_scale, uintptr_t adjustment_bias,
                 uintptr_t dgamma, uintptr_t dbeta, uintptr_t dadjustment_scale, uintptr_t dadjustment_bias) {
  Backward p{};
  p.type = static_cast<Type>(type);
  p.view = {rows, groups, span, features, inner, own};
  p.x = reinterpret_cast<const void*>(x);
  p.dy = reinterpret_cast<const void*>(dy);
  p.dx = reinterpret_cast<void*>(dx);
  p.epsilon = epsilon;
  p.mean = at(mean, wide);
  p.variance = at(variance, wide);
  p.gamma = at(gamma, wide);
  p.r = at(r, wide);
  p.d = at(d, wide);
  p.adjustment_scale = at(adjustment_scale, wide);
  p.adjustment_bias = at(adjustment_bias, wide);
  p.dgamma = at(dgamma, wide);
  p.dbeta = at(dbeta, wide);
  p.dadjustment_scale = at(dadjustment_scale, wide);
  p.dadjustment_bias = at(dadjustment_bias, wide);
  Team team(openmp, threads);
  call(kernels().backward, p);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Batch normalization of contiguous arrays seen as (rows, features, inner); see native/normalize.hpp.";
  using nb::arg;
  m.def("forward", &forward, arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"), arg("own"),
        arg("x").noconvert(), arg("y").noconvert(), arg("epsilon"), arg("gamma").noconvert().none(),
        arg("beta").noconvert().none(), arg("adjustment_scale").noconvert().none(),
        arg("adjustment_bias").noconvert().none(), arg("renorm_mean").noconvert().none(),
        arg("renorm_stddev").noconvert().none(), arg("rmin"), arg("rmax"), arg("dmax"), arg("mean").noconvert(),
        arg("variance").noconvert(), arg("r").noconvert().none(), arg("d").noconvert().none());
  m.def("backward", &backward, arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"), arg("own"),
        arg("x").noconvert(), arg("dy").noconvert(), arg("dx").noconvert(), arg("epsilon"), arg("mean").noconvert(),
        arg("variance").noconvert(), arg("gamma").noconvert().none(), arg("r").noconvert().none(),
        arg("d").noconvert().none(), arg("adjustment_scale").noconvert().none(),
        arg("adjustment_bias").noconvert().none(), arg("dgamma").noconvert().none(), arg("dbeta").noconvert().none(),
        arg("dadjustment_scale").noconvert().none(), arg("dadjustment_bias").noconvert().none());
  m.def("use_openmp", [](uintptr_t address) { openmp = reinterpret_cast<OpenMP>(address); });
  m.def("forward_at", &forward_at);
  m.def("backward_at", &backward_at);
  m.def("moments", &moments, arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"), arg("own"),
        arg("x").noconvert(), arg("mean").noconvert(), arg("variance").noconvert());
  m.def("scale_shift", &scale_shift, arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"), arg("own"),
        arg("x").noconvert(), arg("y").noconvert(), arg("scale").noconvert(), arg("shift").noconvert());
  m.def("gradient_sums", &gradient_sums, arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"),
        arg("own"),
        arg("x").noconvert(), arg("dy").noconvert(), arg("mean").noconvert(), arg("dy_sum").noconvert(),
        arg("dy_centered_sum").noconvert());
  m.def("gradient_combine", &gradient_combine, arg("rows"), arg("groups"), arg("span"), arg("features"), arg("inner"),
        arg("own"),
        arg("x").noconvert(), arg("dy").noconvert(), arg("dx").noconvert(), arg("dy_weight").noconvert(),
        arg("x_weight").noconvert(), arg("constant").noconvert());
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", [](int64_t threads) {
    if (threads < 1) refuse("threads must be at least 1; received " + std::to_string(threads));
    set_num_threads(static_cast<int>(threads < INT_MAX ? threads : INT_MAX));
  }, arg("threads"));
}
