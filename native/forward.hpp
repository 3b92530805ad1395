// The fused forward operation.
#pragma once

#include "coefficients.hpp"
#include "inner.hpp"
#include "rows.hpp"

namespace batchnorm {
namespace {

template <class S>
void forward_inner(const Forward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  bool serial = v.size() < SERIAL, renorm = static_cast<bool>(p.renorm_mean), wait = renorm && !v.own;
  int64_t block = Inner<S>::block(v, 1, wait, serial);
  run_tasks(ceil_div(v.features, block), serial, [&](int64_t task) {
    int64_t c0 = task * block, c1 = least(v.features, c0 + block), width = c1 - c0;
    int64_t kept = wait ? v.groups : 1;  // groups to be measured before any can be normalized
    Carver carver(Slot::task, (kept * 2 + 6) * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
    double *mean = carver.take<double>(kept * width), *variance = carver.take<double>(kept * width);
    double *factor = carver.take<double>(width), *offset = carver.take<double>(width);
    double* deltas = carver.take<double>(width);
    Inner<S> inner(v, carver, width);
    Value *origin = carver.take<Value>(width), *scale = carver.take<Value>(width), *shift = carver.take<Value>(width);
    auto finish = [&](int64_t g, const double* m, const double* var) {
      coefficients(width, p.epsilon, factor, offset, m, var, origin, scale, shift);
      inner.scale(x, y, g, c0, c1, origin, scale, shift);
    };
    if (!renorm && !v.own) options(p, c0, width, factor, offset);
    for (int64_t g = 0; g < v.groups; g++) {
      int64_t i = g * v.features + c0;
      double *m = mean + (wait ? g * width : 0), *var = variance + (wait ? g * width : 0);
      inner.moments(x, g, c0, c1, m, var, origin, deltas);
      write(p.mean, i, width, m);
      write(p.variance, i, width, var);
      if (wait) continue;
      if (renorm) correction(p, i, width, m, var);
      if (v.own) options(p, i, width, factor, offset);
      finish(g, m, var);
    }
    if (!wait) return;
    double groups = static_cast<double>(most<int64_t>(v.groups, 1));
    for (int64_t c = 0; c < width; c++) {
      double m = 0, var = 0;
      for (int64_t g = 0; g < v.groups; g++) m += mean[g * width + c], var += variance[g * width + c];
      m /= groups, var /= groups;
      correction(p, c0 + c, 1, &m, &var);
    }
    options(p, c0, width, factor, offset);
    for (int64_t g = v.groups - 1; g >= 0; g--) finish(g, mean + g * width, variance + g * width);
  });
}

// Moments of a whole batch in pieces that go to several threads, put together in a fixed order. `take(c0, c1, mean,
// variance)` gets those of features [c0, c1), on several threads too.
template <class S>
int64_t moments_whole_bytes(const View& v, int64_t pieces) {
  return 3 * (pieces * (Rows<S>{v}.wide() + 16) * 8 + 64);
}

template <class S, class Take>
void moments_whole(Carver& carver, const View& v, const typename S::Stored* x, bool serial, int64_t pieces,
                   Take&& take) {
  using Value = typename S::Value;
  Rows<S> rows{v};
  int64_t wide = (rows.wide() + 15) / 16 * 16;
  double *sums = carver.take<double>(pieces * wide), *squares = carver.take<double>(pieces * wide);
  Value* origins = carver.take<Value>(pieces * wide);
  run_tasks(pieces, serial, [&](int64_t j) {
    rows.moments(x, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origins + j * wide, sums + j * wide,
                 squares + j * wide);
  });
  constexpr int64_t FEATURES = 256;  // in one task
  double inverse = v.rows ? 1 / static_cast<double>(v.rows) : 0;
  run_tasks(ceil_div(v.features, FEATURES), serial || v.features <= FEATURES, [&](int64_t task) {
    int64_t c0 = task * FEATURES, width = least(v.features - c0, FEATURES);
    double mean[FEATURES], variance[FEATURES];
    for (int64_t c = 0; c < width; c++) mean[c] = variance[c] = 0;
    auto each = [&](auto&& add) {
      for (int64_t j = 0; j < pieces; j++)
        add(static_cast<double>(rows.begin(j + 1, pieces) - rows.begin(j, pieces)), j * wide + c0);
    };
    each([&](double n, int64_t at) {
      for (int64_t c = 0; c < width; c++) mean[c] += sums[at + c] + n * static_cast<double>(origins[at + c]);
    });
    for (int64_t c = 0; c < width; c++) mean[c] *= inverse;
    each([&](double n, int64_t at) {  // each piece measured from the mean of all
      for (int64_t c = 0; c < width; c++) {
        double apart = static_cast<double>(origins[at + c]) - mean[c];
        variance[c] += squares[at + c] + apart * (2 * sums[at + c] + n * apart);
      }
    });
    for (int64_t c = 0; c < width; c++) {
      variance[c] *= inverse;
      variance[c] = variance[c] < 0 ? 0 : variance[c];
    }
    take(c0, c0 + width, mean, variance);
  });
}

template <class S>
void forward_rows_whole(const Forward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  int64_t wide = rows.wide(), pieces = rows.pieces(serial);
  Carver carver(Slot::call, 5 * (wide * 8 + 64) + moments_whole_bytes<S>(v, pieces));
  Value *origin = carver.take<Value>(wide), *scale = carver.take<Value>(wide), *shift = carver.take<Value>(wide);
  double *factor = carver.take<double>(wide), *offset = carver.take<double>(wide);
  moments_whole<S>(carver, v, x, serial, pieces, [&](int64_t c0, int64_t c1, const double* mean, const double* variance) {
    write(p.mean, c0, c1 - c0, mean);
    write(p.variance, c0, c1 - c0, variance);
    if (p.renorm_mean) correction(p, c0, c1 - c0, mean, variance);
    options(p, c0, c1 - c0, factor + c0, offset + c0);
    coefficients(c1 - c0, p.epsilon, factor + c0, offset + c0, mean, variance, origin + c0, scale + c0, shift + c0);
  });
  rows.spread(origin);
  rows.spread(scale);
  rows.spread(shift);
  run_tasks(pieces, serial, [&](int64_t task) {
    int64_t j = pieces - 1 - task;
    rows.scale(x, y, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origin, scale, shift);
  });
}

template <class S>
void forward_rows_groups(const Forward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  bool serial = v.size() < SERIAL, renorm = static_cast<bool>(p.renorm_mean);
  Rows<S> rows{v};
  int64_t f = v.features;
  GroupBlocks blocks(v, serial);
  Carver call(Slot::call, 4 * (f * 8 + 64));
  double *shared_factor = call.take<double>(f), *shared_offset = call.take<double>(f);
  auto phase = [&](bool measure, bool normalize) {
    run_tasks(blocks.tasks, serial, [&](int64_t task) {
      Carver carver(Slot::task, 9 * (f * 8 + 64));
      double *sum = carver.take<double>(f), *squares = carver.take<double>(f);
      double *factor = v.own ? carver.take<double>(f) : shared_factor;
      double *offset = v.own ? carver.take<double>(f) : shared_offset;
      Value *mean = carver.take<Value>(f), *variance = carver.take<Value>(f);
      Value *origin = carver.take<Value>(f), *scale = carver.take<Value>(f), *shift = carver.take<Value>(f);
      for (int64_t g = task * blocks.size; g < least(v.groups, (task + 1) * blocks.size); g++) {
        if (measure) {
          rows.group_moments(x, g, mean, variance, sum, squares);
          write(p.mean, g * f, f, mean);
          write(p.variance, g * f, f, variance);
        } else {
          read(p.mean, g * f, f, mean);
          read(p.variance, g * f, f, variance);
        }
        if (v.own) {
          if (renorm) correction(p, g * f, f, mean, variance);
          options(p, g * f, f, factor, offset);
        }
        if (normalize) {
          coefficients(f, p.epsilon, factor, offset, mean, variance, origin, scale, shift);
          rows.scale(x, y, g, 0, rows.group_rows(), origin, scale, shift);
        }
      }
    });
  };
  if (v.own) return phase(true, true);
  if (!renorm) {
    options(p, 0, f, shared_factor, shared_offset);
    return phase(true, true);
  }
  phase(true, false);
  double *mean = call.take<double>(f), *variance = call.take<double>(f);
  double share = 1 / static_cast<double>(most<int64_t>(v.groups, 1));
  for (int64_t c = 0; c < f; c++) mean[c] = variance[c] = 0;
  for (int64_t g = 0; g < v.groups; g++)
    for (int64_t c = 0; c < f; c++) {
      mean[c] += p.mean.get(g * f + c) * share;
      variance[c] += p.variance.get(g * f + c) * share;
    }
  correction(p, 0, f, mean, variance);
  options(p, 0, f, shared_factor, shared_offset);
  phase(false, true);
}

template <class S>
void forward(const Forward& p) {
  will_write(p.y, p.view.bytes(p.type));
  if (p.view.inner > 1) return forward_inner<S>(p);
  if (p.view.groups == 1) return forward_rows_whole<S>(p);
  forward_rows_groups<S>(p);
}

}  // namespace
}  // namespace batchnorm
