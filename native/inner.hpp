// Features in the middle: a block of features at a time, which stays in cache.
#pragma once

#include "passes.hpp"
#include "tasks.hpp"

namespace batchnorm {
namespace {

constexpr int64_t CACHE = 2 << 20;             // bytes of a block of features that should stay in a cache
constexpr int64_t STRETCH = 64 * 1024;         // bytes that should be read side by side
constexpr int64_t NARROW_STRETCH = 32 * 1024;  // the same where every value has coefficients of its own
constexpr int64_t BURST = 1024;                // bytes of one place that are read before it is the next one's turn

template <class S>
class Inner {
 public:
  using Stored = typename S::Stored;
  using Value = typename S::Value;
  using Vector = typename S::Vector;

  // Works on up to `width` features at a time, in scratch memory that it takes.
  Inner(const View& view, Carver& carver, int64_t width) : v(view) {
    if (narrow(v)) {
      for (double*& sums : column_sums) sums = carver.take<double>(width * v.inner);
      for (Value*& by : columns) by = carver.take<Value>(width * v.inner);
    } else {
      partial = carver.take<Vector>(2 * width);
    }
  }
  static int64_t scratch_bytes(const View& v, int64_t width) {
    return narrow(v) ? 6 * (width * v.inner * 8 + 64) : 2 * width * static_cast<int64_t>(sizeof(Vector)) + 64;
  }

  // How many features to work on at a time.
  static int64_t block(const View& v, int64_t arrays, bool all_groups, bool serial) {
    int64_t run = v.inner * static_cast<int64_t>(sizeof(Stored));
    int64_t bytes = (all_groups ? v.rows : v.rows / v.groups) * run * arrays;
    int64_t side = ceil_div(narrow(v) ? NARROW_STRETCH : STRETCH, run);
    int64_t features = most<int64_t>(1, least(side, CACHE / most<int64_t>(bytes, 1)));
    if (serial) return least(features, v.features);
    int64_t share = 2 * num_threads(), tasks = ceil_div(ceil_div(v.features, features), share) * share;
    return ceil_div(v.features, tasks);  // so that every thread has as much to do
  }

  void moments(const Stored* x, int64_t group, int64_t c0, int64_t c1, double* mean, double* variance,
               Value* origin, double* deltas) const {
    int64_t rows = group_rows(), width = c1 - c0;
    if (narrow(v)) {
      add_columns<1>({x}, group, c0, width, least(rows, FIRST), deltas, variance,
                     [&](auto& p, int64_t n, int64_t f, double* s, double*) { sum_rows<S>(p[0], n, f, s); });
      double share = 1 / static_cast<double>(most<int64_t>(least(rows, FIRST) * v.inner, 1));
      for (int64_t c = 0; c < width; c++) origin[c] = static_cast<Value>(deltas[c] * share);
      const Value* by = spread(origin, width, columns[0]);
      add_columns<1>({x}, group, c0, width, rows, deltas, variance,
                     [&](auto& p, int64_t n, int64_t f, double* s, double* q) {
                       moments_rows<S>(p[0], n, f, by, s, q);
                     });
    } else {
      int64_t some = least<int64_t>(v.inner, WAYS * W);
      for (int64_t c = 0; c < width; c++) {
        Vector sum = {}, squares = {};
        if (rows) moments_run<S>(x + offset(group, 0, c0 + c), some, 0, sum, squares);
        origin[c] = static_cast<Value>(total(sum) / static_cast<double>(some));
      }
      add_runs(group, c0, c1, deltas, variance, [&](int64_t at, int64_t n, int64_t c, Vector& sum, Vector& squares) {
        moments_run<S>(x + at, n, origin[c], sum, squares);
      });
    }
    double inverse = rows ? 1 / static_cast<double>(rows * v.inner) : 0;
    for (int64_t c = 0; c < width; c++) {
      double delta = deltas[c] * inverse, square = variance[c] * inverse - delta * delta;
      mean[c] = static_cast<double>(origin[c]) + delta;
      variance[c] = square < 0 ? 0 : square;
    }
  }

  void scale(const Stored* x, Stored* y, int64_t group, int64_t c0, int64_t c1, const Value* origin, const Value* scale,
             const Value* shift) const {
    int64_t width = c1 - c0;
    if (narrow(v)) {
      const Value *o = spread(origin, width, columns[0]), *a = spread(scale, width, columns[1]);
      const Value* b = spread(shift, width, columns[2]);
      by_columns<2>({x, y}, group, c0, width, group_rows(), [&](auto& p, int64_t n, int64_t f) {
        scale_rows<S>(p[0], const_cast<Stored**>(p[1]), n, f, past, o, a, b);
      });
    } else {
      for (int64_t i = group_rows() - 1; i >= 0; i--) {  // backwards: the end is what the cache still has
        int64_t at = offset(group, i, c0);
        for (int64_t c = 0; c < width; c++, at += v.inner)
          scale_run<S>(x + at, y + at, v.inner, past, origin[c], scale[c], shift[c]);
      }
    }
    if (past) fence();
  }

  void sums(const Stored* x, const Stored* dy, int64_t group, int64_t c0, int64_t c1, const Value* origin, double* sum,
            double* centered) const {
    int64_t width = c1 - c0;
    if (narrow(v)) {
      const Value* by = spread(origin, width, columns[0]);
      add_columns<2>({x, dy}, group, c0, width, group_rows(), sum, centered,
                     [&](auto& p, int64_t n, int64_t f, double* s, double* t) {
                       gradient_sums_rows<S>(p[0], p[1], n, f, by, s, t);
                     });
    } else {
      add_runs(group, c0, c1, sum, centered, [&](int64_t at, int64_t n, int64_t c, Vector& first, Vector& second) {
        gradient_sums_run<S>(x + at, dy + at, n, origin[c], first, second);
      });
    }
  }

  void combine(const Stored* x, const Stored* dy, Stored* dx, int64_t group, int64_t c0, int64_t c1,
               const Value* origin, const Value* dy_weight, const Value* x_weight, const Value* constant) const {
    int64_t width = c1 - c0;
    if (narrow(v)) {
      const Value *o = spread(origin, width, columns[0]), *a = spread(dy_weight, width, columns[1]);
      const Value *b = spread(x_weight, width, columns[2]), *c = spread(constant, width, columns[3]);
      by_columns<3>({x, dy, dx}, group, c0, width, group_rows(), [&](auto& p, int64_t n, int64_t f) {
        combine_rows<S>(p[0], p[1], const_cast<Stored**>(p[2]), n, f, past, o, a, b, c);
      });
    } else {
      for (int64_t i = group_rows() - 1; i >= 0; i--) {
        int64_t at = offset(group, i, c0);
        for (int64_t c = 0; c < width; c++, at += v.inner)
          combine_run<S>(x + at, dy + at, dx + at, v.inner, past, origin[c], dy_weight[c], x_weight[c], constant[c]);
      }
    }
    if (past) fence();
  }

 private:
  // Whether a run is shorter than two vectors. Then rows are worked on as if every value were a feature.
  static bool narrow(const View& v) { return v.inner < 2 * W; }

  int64_t group_rows() const { return v.rows / v.groups; }
  int64_t offset(int64_t group, int64_t i, int64_t c) const {
    return (row_of(v, group, i) * v.features + c) * v.inner;
  }

  // Calls run(i, at, c) for every row i and feature c0 + c before c1 of a group, whose values begin at `at`. Short runs of
  // several rows take turns: while some of one row are worked on, the processor fetches what follows in the others.
  template <class Run>
  void runs(int64_t group, int64_t c0, int64_t c1, Run&& run) const {
    int64_t rows = group_rows(), bytes = v.inner * static_cast<int64_t>(sizeof(Stored));
    int64_t some = bytes < BURST ? ceil_div(BURST, bytes) : c1 - c0;
    for (int64_t begin = 0; begin < rows; begin += PLACES)
      for (int64_t c = c0; c < c1; c += some)
        for (int64_t i = begin; i < least(rows, begin + PLACES); i++) {
          int64_t at = offset(group, i, c);
          for (int64_t k = c; k < least(c1, c + some); k++, at += v.inner) run(i, at, k - c0);
        }
  }

  // Adds up, for each feature in [c0, c1) of a group, what `add(at, n, c, first, second)` gives for the n values from
  // `at` on: in vectors for as long as that is exact enough, then in doubles.
  template <class Add>
  void add_runs(int64_t group, int64_t c0, int64_t c1, double* firsts, double* seconds, Add&& add) const {
    int64_t rows = group_rows(), width = c1 - c0, held = most<int64_t>(1, least(ROWS, BLOCK / v.inner));
    Vector *first = partial, *second = partial + width;
    for (int64_t c = 0; c < width; c++) {
      firsts[c] = seconds[c] = 0;
      first[c] = second[c] = Vector{};
    }
    runs(group, c0, c1, [&](int64_t i, int64_t at, int64_t c) {
      bool full = (i + 1) % held == 0 || i + 1 == rows;
      for (int64_t begin = 0; begin < v.inner; begin += BLOCK) {
        add(at + begin, least(BLOCK, v.inner - begin), c, first[c], second[c]);
        if (!full) continue;
        firsts[c] += total(first[c]);
        seconds[c] += total(second[c]);
        first[c] = second[c] = Vector{};
      }
    });
  }

  // ---- With every value as if it were a feature, a column of its own.

  // Repeats what is by feature for each of its columns.
  const Value* spread(const Value* by, int64_t width, Value* to) const {
    for (int64_t c = 0; c < width; c++)
      for (int64_t k = 0; k < v.inner; k++) to[c * v.inner + k] = by[c];
    return to;
  }

  // Calls body with pointers to up to ROWS of the first `rows` rows at a time.
  template <int ARRAYS, class Body>
  void by_columns(const Stored* const (&arrays)[ARRAYS], int64_t group, int64_t c0, int64_t width, int64_t rows,
                  Body&& body) const {
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
      const Stored* pointers[ARRAYS][ROWS];
      int64_t n = least(ROWS, rows - begin);
      for (int64_t i = 0; i < n; i++)
        for (int a = 0; a < ARRAYS; a++) pointers[a][i] = arrays[a] + offset(group, begin + i, c0);
      body(pointers, n, width * v.inner);
    }
  }

  template <int ARRAYS, class Add>
  void add_columns(const Stored* const (&arrays)[ARRAYS], int64_t group, int64_t c0, int64_t width, int64_t rows,
                   double* firsts, double* seconds, Add&& add) const {
    double *first = column_sums[0], *second = column_sums[1];
    for (int64_t k = 0; k < width * v.inner; k++) first[k] = second[k] = 0;
    by_columns<ARRAYS>(arrays, group, c0, width, rows,
                       [&](auto& p, int64_t n, int64_t f) { add(p, n, f, first, second); });
    for (int64_t c = 0; c < width; c++) {
      firsts[c] = seconds[c] = 0;
      for (int64_t k = c * v.inner; k < (c + 1) * v.inner; k++) firsts[c] += first[k], seconds[c] += second[k];
    }
  }

  const View& v;
  bool past = goes_past_caches<Stored>(v);  // how results are written
  Vector* partial = nullptr;
  double* column_sums[2] = {};
  Value* columns[4] = {};
};

}  // namespace
}  // namespace batchnorm
