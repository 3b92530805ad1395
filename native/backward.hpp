// The fused backward operation.
#pragma once

#include "coefficients.hpp"
#include "inner.hpp"
#include "rows.hpp"

namespace batchnorm {
namespace {

template <class S>
void backward_inner(const Backward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  bool serial = v.size() < SERIAL;
  int64_t block = Inner<S>::block(v, 2, false, serial);
  run_tasks(ceil_div(v.features, block), serial, [&](int64_t task) {
    int64_t c0 = task * block, c1 = least(v.features, c0 + block), width = c1 - c0;
    Carver carver(Slot::task, 10 * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
    double *sum = carver.take<double>(width), *centered = carver.take<double>(width);
    double *all = carver.take<double>(width), *normalized = carver.take<double>(width);
    double* factor = carver.take<double>(width);
    Value *origin = carver.take<Value>(width), *variance = carver.take<Value>(width);
    Value *dy_weight = carver.take<Value>(width), *x_weight = carver.take<Value>(width);
    Value* constant = carver.take<Value>(width);
    Inner<S> inner(v, carver, width);
    for (int64_t g = 0; g < v.groups; g++) {
      int64_t i = g * v.features + c0, own = v.own ? i : c0;
      if (g == 0 || v.own) {
        options(p, own, width, factor);
        for (int64_t c = 0; c < width; c++) all[c] = normalized[c] = 0;
      }
      read(p.mean, i, width, origin);
      read(p.variance, i, width, variance);
      inner.sums(x, dy, g, c0, c1, origin, sum, centered);
      combination(width, v.count(), p.epsilon, factor, variance, sum, centered, dy_weight, x_weight, constant, all,
                  normalized);
      inner.combine(x, dy, dx, g, c0, c1, origin, dy_weight, x_weight, constant);
      if (g == v.groups - 1 || v.own) parameter_gradients(p, own, width, all, normalized);
    }
  });
}

template <class S>
int64_t sums_whole_bytes(const View& v, int64_t pieces) {
  return 2 * (pieces * (Rows<S>{v}.wide() + 16) * 8 + 64);
}

// Sums over a whole batch, in the first piece of `sums` and of `centered`.
template <class S>
void sums_whole(Carver& carver, const View& v, const typename S::Stored* x, const typename S::Stored* dy,
                const typename S::Value* origin, bool serial, int64_t pieces, double*& sums, double*& centered) {
  Rows<S> rows{v};
  int64_t wide = (rows.wide() + 15) / 16 * 16;
  sums = carver.take<double>(pieces * wide);
  centered = carver.take<double>(pieces * wide);
  run_tasks(pieces, serial, [&](int64_t j) {
    rows.sums(x, dy, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origin, sums + j * wide,
              centered + j * wide);
  });
  for (int64_t j = 1; j < pieces; j++)
    for (int64_t c = 0; c < v.features; c++) {
      sums[c] += sums[j * wide + c];
      centered[c] += centered[j * wide + c];
    }
}

template <class S>
void backward_rows_whole(const Backward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  int64_t wide = rows.wide(), pieces = rows.pieces(serial);
  Carver carver(Slot::call, 8 * (wide * 8 + 64) + sums_whole_bytes<S>(v, pieces));
  Value *origin = carver.take<Value>(wide), *variance = carver.take<Value>(wide);
  Value *dy_weight = carver.take<Value>(wide), *x_weight = carver.take<Value>(wide);
  Value* constant = carver.take<Value>(wide);
  double *factor = carver.take<double>(wide), *all = carver.take<double>(wide), *normalized = carver.take<double>(wide);
  read(p.mean, 0, v.features, origin);
  read(p.variance, 0, v.features, variance);
  rows.spread(origin);
  options(p, 0, v.features, factor);
  double *sums, *centered;
  sums_whole<S>(carver, v, x, dy, origin, serial, pieces, sums, centered);
  for (int64_t c = 0; c < v.features; c++) all[c] = normalized[c] = 0;
  combination(v.features, v.count(), p.epsilon, factor, variance, sums, centered, dy_weight, x_weight, constant, all,
              normalized);
  parameter_gradients(p, 0, v.features, all, normalized);
  rows.spread(dy_weight);
  rows.spread(x_weight);
  rows.spread(constant);
  run_tasks(pieces, serial, [&](int64_t task) {
    int64_t j = pieces - 1 - task;
    rows.combine(x, dy, dx, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origin, dy_weight, x_weight, constant);
  });
}

template <class S>
void backward_rows_groups(const Backward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  int64_t n = rows.group_rows(), f = v.features;
  GroupBlocks blocks(v, serial);
  Carver call(Slot::call, 2 * (blocks.tasks * f * 8 + 64) + f * 8 + 64);
  double *all = call.take<double>(blocks.tasks * f), *normalized = call.take<double>(blocks.tasks * f);
  double* shared_factor = call.take<double>(f);
  if (!v.own) options(p, 0, f, shared_factor);
  run_tasks(blocks.tasks, serial, [&](int64_t task) {
    Carver carver(Slot::task, 8 * (f * 8 + 64));
    double *sum = carver.take<double>(f), *centered = carver.take<double>(f);
    double* factor = v.own ? carver.take<double>(f) : shared_factor;
    Value *origin = carver.take<Value>(f), *variance = carver.take<Value>(f);
    Value *dy_weight = carver.take<Value>(f), *x_weight = carver.take<Value>(f), *constant = carver.take<Value>(f);
    double *own_all = all + task * f, *own_normalized = normalized + task * f;
    auto clear = [&] {
      for (int64_t c = 0; c < f; c++) own_all[c] = own_normalized[c] = 0;
    };
    clear();
    for (int64_t g = task * blocks.size; g < least(v.groups, (task + 1) * blocks.size); g++) {
      if (v.own) options(p, g * f, f, factor);
      read(p.mean, g * f, f, origin);
      read(p.variance, g * f, f, variance);
      rows.sums(x, dy, g, 0, n, origin, sum, centered);
      combination(f, v.count(), p.epsilon, factor, variance, sum, centered, dy_weight, x_weight, constant, own_all,
                  own_normalized);
      rows.combine(x, dy, dx, g, 0, n, origin, dy_weight, x_weight, constant);
      if (v.own) {
        parameter_gradients(p, g * f, f, own_all, own_normalized);
        clear();
      }
    }
  });
  if (v.own) return;
  for (int64_t task = 1; task < blocks.tasks; task++)
    for (int64_t c = 0; c < f; c++) {
      all[c] += all[task * f + c];
      normalized[c] += normalized[task * f + c];
    }
  parameter_gradients(p, 0, f, all, normalized);
}

template <class S>
void backward(const Backward& p) {
  will_write(p.dx, p.view.bytes(p.type));
  if (p.view.inner > 1) return backward_inner<S>(p);
  if (p.view.groups == 1) return backward_rows_whole<S>(p);
  backward_rows_groups<S>(p);
}

}  // namespace
}  // namespace batchnorm
