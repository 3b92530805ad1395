// Features last: rows of all features. A few features are seen as a wider row of several rows side by side.
#pragma once

#include "passes.hpp"
#include "tasks.hpp"

namespace batchnorm {
namespace {

constexpr int64_t WIDE = 512;  // features up to which rows are joined

template <class S>
struct Rows {
  using Stored = typename S::Stored;
  using Value = typename S::Value;
  const View& v;
  bool past = goes_past_caches<Stored>(v);  // how results are written

  int64_t group_rows() const { return v.rows / v.groups; }
  // At most ROWS, so that one block takes the rows that are left.
  int64_t widening() const {
    if (v.groups > 1 || v.size() < SERIAL) return 1;
    return most<int64_t>(1, least(ROWS, WIDE / v.features));
  }
  int64_t wide() const { return v.features * widening(); }

  // Calls body with pointers to up to ROWS rows at a time, `step` rows side by side seen as one.
  template <int ARRAYS, class Body>
  void block(const Stored* const (&arrays)[ARRAYS], int64_t group, int64_t begin, int64_t end, int64_t step,
             Body&& body) const {
    const Stored* pointers[ARRAYS][ROWS];
    int64_t n = 0;
    for (int64_t i = begin; i < end; i += step, n++)
      for (int a = 0; a < ARRAYS; a++) pointers[a][n] = arrays[a] + row_of(v, group, i) * v.features;
    if (n > 0) body(pointers, n, v.features * step);
  }
  // The same for all rows of [begin, end), as wide ones as far as that goes, from several places in turn: while rows of
  // one are worked on, the processor fetches what follows in the others.
  template <int ARRAYS, class Body>
  void blocks(const Stored* const (&arrays)[ARRAYS], int64_t group, int64_t begin, int64_t end, Body&& body) const {
    constexpr int64_t TURNS = ARRAYS < 3 ? PLACES : PLACES / 2, LENGTH = ROWS / TURNS;
    int64_t w = widening(), length = (end - begin) / w / TURNS;
    for (int64_t first = 0; first < length; first += LENGTH) {
      const Stored* pointers[ARRAYS][ROWS];
      int64_t n = 0;
      for (int64_t j = first; j < least(length, first + LENGTH); j++)
        for (int64_t place = 0; place < TURNS; place++, n++) {
          int64_t at = row_of(v, group, begin + (place * length + j) * w) * v.features;
          for (int a = 0; a < ARRAYS; a++) pointers[a][n] = arrays[a] + at;
        }
      body(pointers, n, v.features * w);
    }
    int64_t whole = begin + (end - begin) / w * w;
    block<ARRAYS>(arrays, group, begin + length * TURNS * w, whole, w, body);
    block<ARRAYS>(arrays, group, whole, end, 1, body);
  }

  void spread(Value* values) const {  // repeat by-feature values over a wide row
    for (int64_t at = v.features; at < wide(); at += v.features)
      std::memcpy(values + at, values, static_cast<size_t>(v.features) * sizeof(Value));
  }
  void fold(double* sums) const {
    for (int64_t at = v.features; at < wide(); at += v.features)
      for (int64_t c = 0; c < v.features; c++) sums[c] += sums[at + c];
  }
  static void zero(double* sums, int64_t n) {
    for (int64_t c = 0; c < n; c++) sums[c] = 0;
  }

  // Sums of distances from an origin near the data. origin, sum and squares have room for a wide row.
  void moments(const Stored* x, int64_t group, int64_t begin, int64_t end, Value* origin, double* sum,
               double* squares) const {
    zero(sum, wide());
    zero(squares, wide());
    int64_t first = least(end, begin + FIRST);
    const Stored* const arrays[1] = {x};
    block<1>(arrays, group, begin, first, 1, [&](auto& p, int64_t n, int64_t f) { sum_rows<S>(p[0], n, f, sum); });
    fold(sum);
    for (int64_t c = 0; c < v.features; c++)
      origin[c] = first > begin ? static_cast<Value>(sum[c] / static_cast<double>(first - begin)) : 0;
    spread(origin);
    zero(sum, wide());
    blocks<1>(arrays, group, begin, end,
              [&](auto& p, int64_t n, int64_t f) { moments_rows<S>(p[0], n, f, origin, sum, squares); });
    fold(sum);
    fold(squares);
  }

  // Of a whole group; sum and squares have room for a row.
  void group_moments(const Stored* x, int64_t group, Value* mean, Value* variance, double* sum, double* squares) const {
    int64_t rows = group_rows();
    if (rows <= ROWS) {
      for (int64_t c = 0; rows == 0 && c < v.features; c++) mean[c] = variance[c] = 0;
      const Stored* const arrays[1] = {x};
      block<1>(arrays, group, 0, rows, 1,
               [&](auto& p, int64_t n, int64_t f) { moments_few_rows<S>(p[0], n, f, mean, variance); });
      return;
    }
    moments(x, group, 0, rows, mean, sum, squares);
    double inverse = 1 / static_cast<double>(rows);
    for (int64_t c = 0; c < v.features; c++) {
      double delta = sum[c] * inverse, square = squares[c] * inverse - delta * delta;
      mean[c] = static_cast<Value>(static_cast<double>(mean[c]) + delta);
      variance[c] = static_cast<Value>(square < 0 ? 0 : square);
    }
  }

  void scale(const Stored* x, Stored* y, int64_t group, int64_t begin, int64_t end, const Value* origin,
             const Value* scale, const Value* shift) const {
    const Stored* const arrays[2] = {x, y};
    blocks<2>(arrays, group, begin, end, [&](auto& p, int64_t n, int64_t f) {
      scale_rows<S>(p[0], const_cast<Stored**>(p[1]), n, f, past, origin, scale, shift);
    });
    if (past) fence();
  }

  void sums(const Stored* x, const Stored* dy, int64_t group, int64_t begin, int64_t end, const Value* origin,
            double* sum, double* centered) const {
    const Stored* const arrays[2] = {x, dy};
    if (v.groups > 1 && end - begin <= ROWS && begin < end)
      return block<2>(arrays, group, begin, end, 1, [&](auto& p, int64_t n, int64_t f) {
        gradient_sums_few_rows<S>(p[0], p[1], n, f, origin, sum, centered);
      });
    zero(sum, wide());
    zero(centered, wide());
    blocks<2>(arrays, group, begin, end, [&](auto& p, int64_t n, int64_t f) {
      gradient_sums_rows<S>(p[0], p[1], n, f, origin, sum, centered);
    });
    fold(sum);
    fold(centered);
  }

  void combine(const Stored* x, const Stored* dy, Stored* dx, int64_t group, int64_t begin, int64_t end,
               const Value* origin, const Value* dy_weight, const Value* x_weight, const Value* constant) const {
    const Stored* const arrays[3] = {x, dy, dx};
    blocks<3>(arrays, group, begin, end, [&](auto& p, int64_t n, int64_t f) {
      combine_rows<S>(p[0], p[1], const_cast<Stored**>(p[2]), n, f, past, origin, dy_weight, x_weight, constant);
    });
    if (past) fence();
  }

  // How many pieces a whole batch is cut into, and where piece j begins. The number of threads may change during a
  // call, so whatever goes by the pieces must count them once.
  int64_t pieces(bool serial) const {
    if (serial) return 1;
    int64_t most_pieces = least(v.size() / SERIAL, ceil_div(v.rows, ROWS * widening()));
    return most<int64_t>(1, least<int64_t>(4 * num_threads(), most_pieces));
  }
  int64_t begin(int64_t j, int64_t pieces) const {
    int64_t unit = ROWS * widening();
    return least(v.rows, ceil_div(ceil_div(v.rows, unit) * j, pieces) * unit);
  }
};

// Groups are cut into blocks, a task each.
struct GroupBlocks {
  int64_t tasks, size;
  GroupBlocks(const View& v, bool serial) {
    tasks = serial ? 1 : least<int64_t>(v.groups, 4 * num_threads());
    size = ceil_div(v.groups, most<int64_t>(tasks, 1));
  }
};

}  // namespace
}  // namespace batchnorm
