// The operations for one instruction set. CMake compiles this file once for each, with BATCHNORM_ISA its name.
#include "backward.hpp"
#include "forward.hpp"

namespace batchnorm {
namespace {

// ---- The passes by themselves. `body(group, c0, c1)` works on features [c0, c1) with features in the middle.

template <class S, class Body>
void by_features(const View& v, int64_t arrays, Body&& body) {
  bool serial = v.size() < SERIAL;
  int64_t block = Inner<S>::block(v, arrays, false, serial);
  run_tasks(ceil_div(v.features, block), serial, [&](int64_t task) {
    for (int64_t g = 0; g < v.groups; g++) body(g, task * block, least(v.features, (task + 1) * block));
  });
}

// `body(group, begin, end)` works on rows [begin, end) of a group with features last.
template <class S, class Body>
void by_rows(const View& v, Body&& body) {
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  if (v.groups == 1) {
    int64_t pieces = rows.pieces(serial);
    run_tasks(pieces, serial, [&](int64_t j) { body(0, rows.begin(j, pieces), rows.begin(j + 1, pieces)); });
    return;
  }
  GroupBlocks blocks(v, serial);
  run_tasks(blocks.tasks, serial, [&](int64_t task) {
    for (int64_t g = task * blocks.size; g < least(v.groups, (task + 1) * blocks.size); g++)
      body(g, 0, rows.group_rows());
  });
}

template <class S>
void moments(const Moments& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  if (v.inner > 1) {
    by_features<S>(v, 1, [&](int64_t g, int64_t c0, int64_t c1) {
      int64_t width = c1 - c0;
      Carver carver(Slot::task, 4 * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
      double *mean = carver.take<double>(width), *variance = carver.take<double>(width);
      double* deltas = carver.take<double>(width);
      Inner<S> inner(v, carver, width);
      inner.moments(x, g, c0, c1, mean, variance, carver.take<Value>(width), deltas);
      write(p.mean, g * v.features + c0, width, mean);
      write(p.variance, g * v.features + c0, width, variance);
    });
  } else if (v.groups == 1) {
    bool serial = v.size() < SERIAL;
    int64_t pieces = Rows<S>{v}.pieces(serial);
    Carver carver(Slot::call, moments_whole_bytes<S>(v, pieces));
    moments_whole<S>(carver, v, x, serial, pieces,
                     [&](int64_t c0, int64_t c1, const double* mean, const double* variance) {
                       write(p.mean, c0, c1 - c0, mean);
                       write(p.variance, c0, c1 - c0, variance);
                     });
  } else {
    by_rows<S>(v, [&](int64_t g, int64_t, int64_t) {
      Carver carver(Slot::task, 4 * (v.features * 8 + 64));
      double *sum = carver.take<double>(v.features), *squares = carver.take<double>(v.features);
      Value *mean = carver.take<Value>(v.features), *variance = carver.take<Value>(v.features);
      Rows<S>{v}.group_moments(x, g, mean, variance, sum, squares);
      write(p.mean, g * v.features, v.features, mean);
      write(p.variance, g * v.features, v.features, variance);
    });
  }
}

// Coefficients of one group in the type of the arithmetic, repeated over a wide row.
template <class S, int N>
struct Prepared {
  typename S::Value* values[N];
  Prepared(const View& v, const Values* const (&given)[N], int64_t group, int64_t c0, int64_t c1, int64_t wide) {
    Carver carver(Slot::task, N * (wide * 8 + 64));
    for (int k = 0; k < N; k++) {
      values[k] = carver.take<typename S::Value>(wide);
      for (int64_t c = 0; !given[k] && c < c1 - c0; c++) values[k][c] = 0;
      if (given[k]) read(*given[k], group * v.features + c0, c1 - c0, values[k]);
      if (wide > c1 - c0) Rows<S>{v}.spread(values[k]);
    }
  }
};

template <class S>
void scale_shift(const ScaleShift& p) {
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  const Values* const given[3] = {nullptr, &p.scale, &p.shift};
  will_write(y, v.bytes(p.type));
  if (v.inner > 1)
    by_features<S>(v, 1, [&](int64_t g, int64_t c0, int64_t c1) {
      Carver call(Slot::call, Inner<S>::scratch_bytes(v, c1 - c0));
      Prepared<S, 3> by(v, given, g, c0, c1, c1 - c0);
      Inner<S>(v, call, c1 - c0).scale(x, y, g, c0, c1, by.values[0], by.values[1], by.values[2]);
    });
  else
    by_rows<S>(v, [&](int64_t g, int64_t begin, int64_t end) {
      Prepared<S, 3> by(v, given, g, 0, v.features, Rows<S>{v}.wide());
      Rows<S>{v}.scale(x, y, g, begin, end, by.values[0], by.values[1], by.values[2]);
    });
}

template <class S>
void gradient_sums(const GradientSums& p) {
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  const Values* const given[1] = {&p.mean};
  if (v.inner > 1) {
    by_features<S>(v, 2, [&](int64_t g, int64_t c0, int64_t c1) {
      int64_t width = c1 - c0;
      Carver call(Slot::call, 2 * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
      double *sum = call.take<double>(width), *centered = call.take<double>(width);
      Prepared<S, 1> by(v, given, g, c0, c1, width);
      Inner<S>(v, call, width).sums(x, dy, g, c0, c1, by.values[0], sum, centered);
      write(p.dy_sum, g * v.features + c0, width, sum);
      write(p.dy_centered_sum, g * v.features + c0, width, centered);
    });
  } else if (v.groups == 1) {
    bool serial = v.size() < SERIAL;
    int64_t wide = Rows<S>{v}.wide(), pieces = Rows<S>{v}.pieces(serial);
    Carver call(Slot::call, wide * 8 + 64 + sums_whole_bytes<S>(v, pieces));
    auto* origin = call.take<typename S::Value>(wide);
    read(p.mean, 0, v.features, origin);
    Rows<S>{v}.spread(origin);
    double *sums, *centered;
    sums_whole<S>(call, v, x, dy, origin, serial, pieces, sums, centered);
    write(p.dy_sum, 0, v.features, sums);
    write(p.dy_centered_sum, 0, v.features, centered);
  } else {
    by_rows<S>(v, [&](int64_t g, int64_t begin, int64_t end) {
      Carver call(Slot::call, 2 * (v.features * 8 + 64));
      double *sum = call.take<double>(v.features), *centered = call.take<double>(v.features);
      Prepared<S, 1> by(v, given, g, 0, v.features, v.features);
      Rows<S>{v}.sums(x, dy, g, begin, end, by.values[0], sum, centered);
      write(p.dy_sum, g * v.features, v.features, sum);
      write(p.dy_centered_sum, g * v.features, v.features, centered);
    });
  }
}

template <class S>
void gradient_combine(const GradientCombine& p) {
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  const Values* const given[4] = {nullptr, &p.dy_weight, &p.x_weight, &p.constant};
  will_write(dx, v.bytes(p.type));
  if (v.inner > 1)
    by_features<S>(v, 2, [&](int64_t g, int64_t c0, int64_t c1) {
      Carver call(Slot::call, Inner<S>::scratch_bytes(v, c1 - c0));
      Prepared<S, 4> by(v, given, g, c0, c1, c1 - c0);
      Inner<S>(v, call, c1 - c0).combine(x, dy, dx, g, c0, c1, by.values[0], by.values[1], by.values[2], by.values[3]);
    });
  else
    by_rows<S>(v, [&](int64_t g, int64_t begin, int64_t end) {
      Prepared<S, 4> by(v, given, g, 0, v.features, Rows<S>{v}.wide());
      Rows<S>{v}.combine(x, dy, dx, g, begin, end, by.values[0], by.values[1], by.values[2], by.values[3]);
    });
}

template <class P, void (*f32)(const P&), void (*f64)(const P&), void (*f16)(const P&), void (*bf16)(const P&)>
void by_type(const P& p) {
  switch (p.type) {
    case Type::float32: return f32(p);
    case Type::float64: return f64(p);
    case Type::float16: return f16(p);
    case Type::bfloat16: return bf16(p);
  }
}

}  // namespace

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

#define EVERY_TYPE(operation) operation<Float32>, operation<Float64>, operation<Float16>, operation<BFloat16>

extern const Kernels NAME(BATCHNORM_ISA);
const Kernels NAME(BATCHNORM_ISA) = {
    TEXT(BATCHNORM_ISA),
    by_type<Forward, EVERY_TYPE(forward)>,
    by_type<Backward, EVERY_TYPE(backward)>,
    by_type<Moments, EVERY_TYPE(moments)>,
    by_type<ScaleShift, EVERY_TYPE(scale_shift)>,
    by_type<GradientSums, EVERY_TYPE(gradient_sums)>,
    by_type<GradientCombine, EVERY_TYPE(gradient_combine)>,
};

}  // namespace batchnorm
