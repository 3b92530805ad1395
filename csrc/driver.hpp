// The operations over a layout: measure, coefficients, write.
//
// A part is written as soon as its moments or sums are known, while its data is in a cache. What must wait for other
// parts (pieces of a whole batch, or groups that share renorm's correction) is written in a second sweep, from the last
// part to the first, for what was read last is still in the caches.
#pragma once

#include "channels_first.hpp"
#include "channels_last.hpp"
#include "coefficients.hpp"
#include "columns.hpp"

namespace batchnorm {
namespace {

template <class Layout, class Body>
void each_part(const Layout& layout, Body&& body) {
  run_tasks(layout.tasks, layout.alone, [&](int64_t task) { body(layout.part(task), task); });
}
template <class Layout, class Body>
void each_part_backwards(const Layout& layout, Body&& body) {
  run_tasks(layout.tasks, layout.alone, [&](int64_t task) { body(layout.part(layout.tasks - 1 - task)); });
}
// Calls body(c, n) for n features from c on.
template <class Body>
void each_feature(int64_t features, bool alone, Body&& body) {
  run_tasks(ceil_div(features, FEATURES), alone || features <= FEATURES,
            [&](int64_t task) { body(task * FEATURES, least(FEATURES, features - task * FEATURES)); });
}

// Room for what goes over the columns of a part, `N` numbers for each.
template <class T, int N>
struct Numbers {
  T* arrays[N];
  Numbers(Scratch& scratch, int64_t columns) {
    for (T*& values : arrays) values = scratch.take<T>(columns);
  }
};

template <class E, int N>
Arrays<E, N> arrays_of(const void* const (&in)[N], void* out) {
  Arrays<E, N> arrays;
  for (int k = 0; k < N; k++) arrays.in[k] = static_cast<const typename E::Stored*>(in[k]);
  arrays.out = static_cast<typename E::Stored*>(out);
  return arrays;
}

// ---- Moments and sums.

// Sums over one group's features of a part, about an origin near the data: the mean of a few values or, where these
// turn out to be unlike the others, that of all. `count` says of how many values the features of a group are.
template <class Layout, class Count>
void sums_about(const Layout& layout, const Arrays<typename Layout::Element, 1>& x, int64_t group, const Part& part,
                const Count& count, typename Layout::Value* origin, double* sums, double* squares) {
  Scratch scratch;
  auto* center = scratch.take<typename Layout::Value>(layout.columns(part));
  auto sum = [&] {
    std::memcpy(center, origin, static_cast<size_t>(part.features()) * sizeof(*origin));
    layout.spread(part, center);
    layout.template sums<MomentsFormula>(x, group, part, center, sums, squares);
  };
  layout.origin(x, group, part, origin);
  sum();
  bool moved = false;
  layout.each_count(part, group, [&](int64_t c, int64_t n, int64_t counted) {
    moved = approach(n, count(counted), sums + c, squares + c, origin + c) || moved;
  });
  if (moved) sum();
}

// Moments of one group's features of a part.
template <class Layout>
void measure(const Layout& layout, const Arrays<typename Layout::Element, 1>& x, int64_t group, const Part& part,
             const Counts& counts, double* mean, double* variance) {
  if constexpr (Layout::FEW_ROWS)
    if (layout.few_rows(group)) return layout.few_rows_moments(x, group, part, mean, variance);
  Scratch scratch;
  auto* origin = scratch.take<typename Layout::Value>(part.features());
  Numbers<double, 2> sums(scratch, layout.columns(part));
  sums_about(layout, x, group, part, counts, origin, sums.arrays[0], sums.arrays[1]);
  layout.each_count(part, group, [&](int64_t c, int64_t n, int64_t counted) {
    moments_about(n, counts(counted), origin + c, sums.arrays[0] + c, sums.arrays[1] + c, mean + c, variance + c);
  });
}

// The sums of the pieces of a whole batch; each has a row of its own.
template <class Layout>
struct Pieces {
  int64_t stride;
  double *firsts, *seconds;
  Pieces(Scratch& scratch, const Layout& layout)
      : stride(ceil_div(layout.columns(layout.all()), 16) * 16),
        firsts(scratch.take<double>(layout.tasks * stride)),
        seconds(scratch.take<double>(layout.tasks * stride)) {}
};

// Calls take(c, n, mean, variance) for n features of a whole batch from c on.
template <class Layout, class Take>
void measure_whole(const Layout& layout, const Arrays<typename Layout::Element, 1>& x, Take&& take) {
  using Value = typename Layout::Value;
  Scratch scratch;
  Pieces<Layout> pieces(scratch, layout);
  Value* origins = scratch.take<Value>(layout.tasks * pieces.stride);
  double* counts = scratch.take<double>(layout.tasks);
  each_part(layout, [&](const Part& part, int64_t j) {
    int64_t at = j * pieces.stride;
    counts[j] = layout.count(part);
    auto count = [&](int64_t) { return counts[j]; };
    sums_about(layout, x, 0, part, count, origins + at, pieces.firsts + at, pieces.seconds + at);
  });
  double inverse = 0;
  for (int64_t j = 0; j < layout.tasks; j++) inverse += counts[j];
  inverse = inverse > 0 ? 1 / inverse : 0;
  each_feature(layout.features, layout.alone, [&](int64_t c0, int64_t n) {
    double mean[FEATURES], variance[FEATURES];
    fill(mean, n, 0.0);
    fill(variance, n, 0.0);
    auto each_piece = [&](auto&& add) {
      for (int64_t j = 0; j < layout.tasks; j++) add(counts[j], j * pieces.stride + c0);
    };
    each_piece([&](double count, int64_t at) {
      for (int64_t c = 0; c < n; c++) mean[c] += pieces.firsts[at + c] + count * static_cast<double>(origins[at + c]);
    });
    for (int64_t c = 0; c < n; c++) mean[c] *= inverse;
    each_piece([&](double count, int64_t at) {  // each measured from the mean of all, which needs no division
      for (int64_t c = 0; c < n; c++) {
        double apart = static_cast<double>(origins[at + c]) - mean[c];
        variance[c] += pieces.seconds[at + c] + apart * (2 * pieces.firsts[at + c] + count * apart);
      }
    });
    for (int64_t c = 0; c < n; c++) {
      variance[c] *= inverse;
      variance[c] = variance[c] < 0 ? 0 : variance[c];
    }
    take(c0, n, mean, variance);
  });
}

// Calls take(c, n, dy_sum, centered_sum); the mean is spread.
template <class Layout, class Take>
void sum_whole(const Layout& layout, const Arrays<typename Layout::Element, 2>& x_dy,
               const typename Layout::Value* mean, Take&& take) {
  Scratch scratch;
  Pieces<Layout> pieces(scratch, layout);
  each_part(layout, [&](const Part& part, int64_t j) {
    layout.template sums<GradientSumsFormula>(x_dy, 0, part, mean, pieces.firsts + j * pieces.stride,
                                              pieces.seconds + j * pieces.stride);
  });
  each_feature(layout.features, layout.alone, [&](int64_t c0, int64_t n) {
    double *sum = pieces.firsts + c0, *centered = pieces.seconds + c0;
    for (int64_t j = 1; j < layout.tasks; j++)
      for (int64_t c = 0; c < n; c++) {
        sum[c] += sum[j * pieces.stride + c];
        centered[c] += centered[j * pieces.stride + c];
      }
    take(c0, n, sum, centered);
  });
}

// ---- The fused operations.

template <class Layout>
void run(const Forward& p) {
  using E = typename Layout::Element;
  using Value = typename E::Value;
  const View& v = p.view;
  const bool renorm = static_cast<bool>(p.renorm_mean), waits = renorm && !v.grouped_parameters && v.groups > 1;
  const Layout layout(v, p.weights, 1, waits);
  const auto arrays = arrays_of<E, 1>({p.x}, p.y);
  Scratch call;
  const Counts counts(call, v, p.weights, p.measured ? p.count : Values{});
  if (!p.measured) counts.write(p.count, p.square_count);
  will_write(p.y, v.bytes(p.type));

  if constexpr (Layout::WHOLE) {
    Scratch scratch;
    Numbers<Value, 3> coefficients(scratch, layout.columns(layout.all()));
    auto take = [&](int64_t c, int64_t n, const double* mean, const double* variance) {
      double factor[FEATURES], offset[FEATURES];
      if (renorm) correction(p, c, n, mean, variance);
      combined(p, c, n, factor, offset);
      normalize_coefficients(n, p.epsilon, factor, offset, mean, variance, coefficients.arrays[0] + c,
                             coefficients.arrays[1] + c, coefficients.arrays[2] + c);
    };
    if (p.measured)
      each_feature(layout.features, layout.alone, [&](int64_t c, int64_t n) {
        double mean[FEATURES], variance[FEATURES];
        read(p.mean, c, n, mean);
        read(p.variance, c, n, variance);
        take(c, n, mean, variance);
      });
    else
      measure_whole(layout, arrays, [&](int64_t c, int64_t n, const double* mean, const double* variance) {
        write(p.mean, c, n, mean);
        write(p.variance, c, n, variance);
        take(c, n, mean, variance);
      });
    for (Value* values : coefficients.arrays) layout.spread(layout.all(), values);
    each_part_backwards(
        layout, [&](const Part& part) { layout.template map<NormalizeFormula>(arrays, 0, part, coefficients.arrays); });
  } else {
    struct Local {  // what a task has for the features of its part
      double *factor, *offset;
      Numbers<Value, 3> coefficients;
      Local(Scratch& scratch, const Layout& layout, const Part& part)
          : factor(scratch.take<double>(part.features())),
            offset(scratch.take<double>(part.features())),
            coefficients(scratch, layout.columns(part)) {}
    };
    auto finish = [&](const Part& part, int64_t g, Local& local, const double* mean, const double* variance) {
      auto& coefficients = local.coefficients.arrays;
      normalize_coefficients(part.features(), p.epsilon, local.factor, local.offset, mean, variance, coefficients[0],
                             coefficients[1], coefficients[2]);
      for (Value* values : coefficients) layout.spread(part, values);
      layout.template map<NormalizeFormula>(arrays, g, part, coefficients);
    };
    Numbers<double, 2> all_moments(call, waits ? v.statistics() : 0);  // of all groups, as exact as they were measured
    each_part(layout, [&](const Part& part, int64_t) {
      Scratch scratch;
      Local local(scratch, layout, part);
      int64_t n = part.features(), c = part.begin_feature;
      Numbers<double, 2> moments(scratch, waits ? 0 : n);
      for (int64_t g = part.begin_group; g < part.end_group; g++) {
        int64_t i = g * layout.features + c;
        double *mean = waits ? all_moments.arrays[0] + i : moments.arrays[0],
               *variance = waits ? all_moments.arrays[1] + i : moments.arrays[1];
        if (p.measured) {
          read(p.mean, i, n, mean);
          read(p.variance, i, n, variance);
        } else {
          measure(layout, arrays, g, part, counts, mean, variance);
          write(p.mean, i, n, mean);
          write(p.variance, i, n, variance);
        }
        if (waits) continue;
        if (renorm) correction(p, v.grouped_parameters ? i : c, n, mean, variance);
        if (g == part.begin_group || v.grouped_parameters) combined(p, i, n, local.factor, local.offset);
        finish(part, g, local, mean, variance);
      }
      if (!waits || !layout.all_groups) return;
      shared_correction(p, counts, c, n, all_moments.arrays[0], all_moments.arrays[1]);
      combined(p, c, n, local.factor, local.offset);
      for (int64_t g = v.groups - 1; g >= 0; g--)
        finish(part, g, local, all_moments.arrays[0] + g * v.features + c, all_moments.arrays[1] + g * v.features + c);
    });
    if (!waits || layout.all_groups) return;
    each_feature(v.features, layout.alone, [&](int64_t c, int64_t n) {
      shared_correction(p, counts, c, n, all_moments.arrays[0], all_moments.arrays[1]);
    });
    each_part_backwards(layout, [&](const Part& part) {
      Scratch scratch;
      Local local(scratch, layout, part);
      combined(p, part.begin_feature, part.features(), local.factor, local.offset);
      for (int64_t g = part.end_group - 1; g >= part.begin_group; g--) {
        int64_t i = g * layout.features + part.begin_feature;
        finish(part, g, local, all_moments.arrays[0] + i, all_moments.arrays[1] + i);
      }
    });
  }
}

template <class Layout>
void run(const Backward& p) {
  using E = typename Layout::Element;
  using Value = typename E::Value;
  const View& v = p.view;
  const Layout layout(v, p.weights, 2, false);
  const auto arrays = arrays_of<E, 2>({p.x, p.dy}, p.dx);
  Scratch call;
  const Counts counts(call, v, p.weights, p.count);
  will_write(p.dx, v.bytes(p.type));

  if constexpr (Layout::WHOLE) {
    Numbers<Value, 4> coefficients(call, layout.columns(layout.all()));
    read(p.mean, 0, v.features, coefficients.arrays[0]);
    layout.spread(layout.all(), coefficients.arrays[0]);
    sum_whole(layout, arrays, coefficients.arrays[0],
              [&](int64_t c, int64_t n, const double* sum, const double* centered) {
                double factor[FEATURES], mean[FEATURES], dy_total[FEATURES], normalized_total[FEATURES];
                Value variance[FEATURES];
                fill(dy_total, n, 0.0);
                fill(normalized_total, n, 0.0);
                read(p.mean, c, n, mean);
                read(p.variance, c, n, variance);
                combined(p, c, n, factor);
                gradient_coefficients(n, counts(0), p.epsilon, factor, mean, variance, sum, centered,
                                      coefficients.arrays[1] + c, coefficients.arrays[2] + c,
                                      coefficients.arrays[3] + c, dy_total, normalized_total);
                parameter_gradients(p, c, n, dy_total, normalized_total);
              });
    for (int k = 1; k < 4; k++) layout.spread(layout.all(), coefficients.arrays[k]);
    each_part_backwards(layout, [&](const Part& part) {
      layout.template map<GradientCombineFormula>(arrays, 0, part, coefficients.arrays);
    });
  } else {
    // Parameters that groups share get the sums over all; of each task where its part has not all groups.
    const bool merges = !layout.all_groups && !v.grouped_parameters;
    Numbers<double, 2> shared(call, merges ? layout.tasks * v.features : 0);
    each_part(layout, [&](const Part& part, int64_t task) {
      Scratch scratch;
      int64_t n = part.features(), columns = layout.columns(part);
      double *factor = scratch.take<double>(n), *mean = scratch.take<double>(n);
      Value* variance = scratch.take<Value>(n);
      Numbers<double, 2> sums(scratch, columns), totals(scratch, n);
      Numbers<Value, 4> coefficients(scratch, columns);
      for (double* total : totals.arrays) fill(total, n, 0.0);
      for (int64_t g = part.begin_group; g < part.end_group; g++) {
        int64_t i = g * layout.features + part.begin_feature;
        if (g == part.begin_group || v.grouped_parameters) combined(p, i, n, factor);
        read(p.mean, i, n, mean);
        read(p.mean, i, n, coefficients.arrays[0]);
        read(p.variance, i, n, variance);
        layout.spread(part, coefficients.arrays[0]);
        layout.template sums<GradientSumsFormula>(arrays, g, part, coefficients.arrays[0], sums.arrays[0],
                                                  sums.arrays[1]);
        layout.each_count(part, g, [&](int64_t k, int64_t m, int64_t counted) {
          gradient_coefficients(m, counts(counted), p.epsilon, factor + k, mean + k, variance + k, sums.arrays[0] + k,
                                sums.arrays[1] + k, coefficients.arrays[1] + k, coefficients.arrays[2] + k,
                                coefficients.arrays[3] + k, totals.arrays[0] + k, totals.arrays[1] + k);
        });
        for (int k = 1; k < 4; k++) layout.spread(part, coefficients.arrays[k]);
        layout.template map<GradientCombineFormula>(arrays, g, part, coefficients.arrays);
        if (!v.grouped_parameters) continue;
        parameter_gradients(p, i, n, totals.arrays[0], totals.arrays[1]);
        for (double* total : totals.arrays) fill(total, n, 0.0);
      }
      if (v.grouped_parameters) return;
      if (!merges) return parameter_gradients(p, part.begin_feature, n, totals.arrays[0], totals.arrays[1]);
      for (int k = 0; k < 2; k++) {
        double* sum = shared.arrays[k] + task * v.features;
        fill(sum, v.features, 0.0);
        for (int64_t begin = 0; begin < n; begin += v.features)
          for (int64_t c = 0; c < v.features; c++) sum[c] += totals.arrays[k][begin + c];
      }
    });
    if (!merges) return;
    each_feature(v.features, layout.alone, [&](int64_t c, int64_t n) {
      double *dy_total = shared.arrays[0] + c, *normalized_total = shared.arrays[1] + c;
      for (int64_t task = 1; task < layout.tasks; task++)
        for (int64_t k = 0; k < n; k++) {
          dy_total[k] += dy_total[task * v.features + k];
          normalized_total[k] += normalized_total[task * v.features + k];
        }
      parameter_gradients(p, c, n, dy_total, normalized_total);
    });
  }
}

// ---- The passes by themselves.

template <class Layout>
void run(const Moments& p) {
  using E = typename Layout::Element;
  const Layout layout(p.view, p.weights, 1, false);
  const auto x = arrays_of<E, 1>({p.x}, nullptr);
  auto take = [&](int64_t i, int64_t n, const double* mean, const double* variance) {
    write(p.mean, i, n, mean);
    write(p.variance, i, n, variance);
  };
  Scratch call;
  const Counts counts(call, p.view, p.weights);
  counts.write(p.count, p.square_count);
  if constexpr (Layout::WHOLE)
    measure_whole(layout, x, take);
  else
    each_part(layout, [&](const Part& part, int64_t) {
      Scratch scratch;
      Numbers<double, 2> moments(scratch, part.features());
      for (int64_t g = part.begin_group; g < part.end_group; g++) {
        measure(layout, x, g, part, counts, moments.arrays[0], moments.arrays[1]);
        take(g * layout.features + part.begin_feature, part.features(), moments.arrays[0], moments.arrays[1]);
      }
    });
}

template <class Layout>
void run(const GradientSums& p) {
  using E = typename Layout::Element;
  using Value = typename E::Value;
  const Layout layout(p.view, p.weights, 2, false);
  const auto x_dy = arrays_of<E, 2>({p.x, p.dy}, nullptr);
  auto take = [&](int64_t i, int64_t n, const double* sum, const double* centered) {
    write(p.dy_sum, i, n, sum);
    write(p.dy_centered_sum, i, n, centered);
  };
  auto each = [&](const Part& part, int64_t g, auto&& sum) {
    Scratch scratch;
    Value* mean = scratch.take<Value>(layout.columns(part));
    read(p.mean, g * layout.features + part.begin_feature, part.features(), mean);
    layout.spread(part, mean);
    sum(mean);
  };
  if constexpr (Layout::WHOLE)
    each(layout.all(), 0, [&](const Value* mean) { sum_whole(layout, x_dy, mean, take); });
  else
    each_part(layout, [&](const Part& part, int64_t) {
      Scratch scratch;
      Numbers<double, 2> sums(scratch, layout.columns(part));
      for (int64_t g = part.begin_group; g < part.end_group; g++)
        each(part, g, [&](const Value* mean) {
          layout.template sums<GradientSumsFormula>(x_dy, g, part, mean, sums.arrays[0], sums.arrays[1]);
          take(g * layout.features + part.begin_feature, part.features(), sums.arrays[0], sums.arrays[1]);
        });
    });
}

// Writes what a formula makes of every value, with coefficients that are given.
template <class Formula, class Layout>
void map(const View& v, const Weights& weights, const Arrays<typename Layout::Element, Formula::ARRAYS>& arrays,
         const Values* const (&given)[Formula::COEFFICIENTS]) {
  using Value = typename Layout::Value;
  const Layout layout(v, weights, Formula::ARRAYS, false);
  each_part(layout, [&](const Part& part, int64_t) {
    Scratch scratch;
    Numbers<Value, Formula::COEFFICIENTS> coefficients(scratch, layout.columns(part));
    for (int64_t g = part.begin_group; g < part.end_group; g++) {
      for (int k = 0; k < Formula::COEFFICIENTS; k++) {
        read(*given[k], g * layout.features + part.begin_feature, part.features(), coefficients.arrays[k]);
        layout.spread(part, coefficients.arrays[k]);
      }
      layout.template map<Formula>(arrays, g, part, coefficients.arrays);
    }
  });
}

template <class Layout>
void run(const Normalize& p) {
  will_write(p.y, p.view.bytes(p.type));
  map<NormalizeFormula, Layout>(p.view, p.weights, arrays_of<typename Layout::Element, 1>({p.x}, p.y),
                                {&p.mean, &p.scale, &p.offset});
}

template <class Layout>
void run(const GradientCombine& p) {
  will_write(p.dx, p.view.bytes(p.type));
  map<GradientCombineFormula, Layout>(p.view, p.weights, arrays_of<typename Layout::Element, 2>({p.x, p.dy}, p.dx),
                                      {&p.mean, &p.a, &p.b, &p.c});
}

}  // namespace
}  // namespace batchnorm
