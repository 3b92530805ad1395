// Features last: rows of all features. Parts are pieces of a whole batch, or groups.
#pragma once

#include "parts.hpp"

namespace batchnorm {
namespace {

constexpr int64_t JOINED = 512;  // features up to which rows are joined

// Rows side by side are seen as one of more columns, so that three features cost per value what 512 do.
template <class E>
class Rows {
 public:
  using Element = E;
  using Value = typename E::Value;

  const View& v;
  const bool alone, all_groups = false;
  int64_t tasks = 1, features;

  int64_t columns(const Part&) const { return v.features * joined_; }
  template <class T>
  void spread(const Part&, T* values) const {
    for (int64_t c = v.features; c < v.features * joined_; c++) values[c] = values[c - v.features];
  }

  void origin(const Arrays<E, 1>& x, int64_t group, const Part& part, Value* origin) const {
    int64_t some = least(part.rows(), FIRST);
    Scratch scratch;
    double *sums = scratch.take<double>(v.features), *squares = scratch.take<double>(v.features);
    fill(sums, v.features, 0.0);
    rows<1>(x, group, part.begin_row, part.begin_row + some, 1,
            [&](const Arrays<E, 1>* at, int64_t n, int64_t columns) {
              sum_few_rows<MomentsFormula, E>(at, n, columns, nullptr, sums, squares);
            });
    double share = 1 / static_cast<double>(most<int64_t>(some, 1));
    for (int64_t c = 0; c < v.features; c++) origin[c] = static_cast<Value>(sums[c] * share);
  }

  template <class Formula>
  void sums(const Arrays<E, Formula::ARRAYS>& from, int64_t group, const Part& part, const Value* origin,
            double* firsts, double* seconds) const {
    using At = const Arrays<E, Formula::ARRAYS>*;
    if (v.groups > 1 && part.rows() > 0 && part.rows() <= ROWS)
      return rows<Formula::ARRAYS>(from, group, part.begin_row, part.end_row, 1,
                                   [&](At at, int64_t n, int64_t columns) {
                                     sum_few_rows<Formula, E>(at, n, columns, origin, firsts, seconds);
                                   });
    fill(firsts, columns(part), 0.0);
    fill(seconds, columns(part), 0.0);
    in_turn<Formula::ARRAYS, Formula::ARRAYS>(from, group, part, [&](At at, int64_t n, int64_t columns) {
      sum_rows<Formula, E>(at, n, columns, origin, firsts, seconds);
    });
    for (int64_t c = v.features; c < columns(part); c += v.features)
      for (int64_t k = 0; k < v.features; k++) firsts[k] += firsts[c + k], seconds[k] += seconds[c + k];
  }

  template <class Formula>
  void map(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, const Part& part,
           Value* const (&coefficients)[Formula::COEFFICIENTS]) const {
    in_turn<Formula::ARRAYS, Formula::ARRAYS + 1>(
        arrays, group, part, [&](const Arrays<E, Formula::ARRAYS>* at, int64_t n, int64_t columns) {
          map_rows<Formula, E>(at, n, columns, past_, coefficients);
        });
    if (past_) fence();
  }

 protected:
  Rows(const View& view, int64_t joined)
      : v(view), alone(v.size() < ALONE), features(v.features), joined_(joined), past_(goes_past_caches<E>(v)) {}

  // Calls body with up to ROWS rows at a time, `joined` rows seen as one.
  template <int N, class Body>
  void rows(const Arrays<E, N>& arrays, int64_t group, int64_t begin, int64_t end, int64_t joined, Body&& body) const {
    Arrays<E, N> at[ROWS];
    int64_t n = 0;
    for (int64_t i = begin; i < end; i += joined) at[n++] = arrays.at(row_of(v, group, i) * v.features);
    if (n > 0) body(at, n, v.features * joined);
  }

  const int64_t joined_;  // at most ROWS

 private:
  // The same for all rows of a part, joined as far as that goes, from several places in turn: while rows of one are
  // worked on, the processor fetches what follows in the others. MEMORIES are the arrays read and written.
  template <int N, int MEMORIES, class Body>
  void in_turn(const Arrays<E, N>& arrays, int64_t group, const Part& part, Body&& body) const {
    constexpr int64_t TURNS = MEMORIES < 3 ? PLACES : PLACES / 2, LENGTH = ROWS / TURNS;
    int64_t begin = part.begin_row, length = part.rows() / joined_ / TURNS;
    for (int64_t first = 0; first < length; first += LENGTH) {
      Arrays<E, N> at[ROWS];
      int64_t n = 0;
      for (int64_t j = first; j < least(length, first + LENGTH); j++)
        for (int64_t place = 0; place < TURNS; place++)
          at[n++] = arrays.at(row_of(v, group, begin + (place * length + j) * joined_) * v.features);
      body(at, n, v.features * joined_);
    }
    int64_t joined_end = begin + part.rows() / joined_ * joined_;
    rows<N>(arrays, group, begin + length * TURNS * joined_, joined_end, joined_, body);
    rows<N>(arrays, group, joined_end, part.end_row, 1, body);
  }

  bool past_;
};

// A whole batch, cut into pieces whose sums are put together.
template <class E>
class WholeBatch : public Rows<E> {
 public:
  static constexpr bool WHOLE = true, FEW_ROWS = false;

  WholeBatch(const View& view, int64_t, bool)
      : Rows<E>(view, view.size() < ALONE ? 1 : most<int64_t>(1, least(ROWS, JOINED / view.features))) {
    if (this->alone) return;
    int64_t limit = least(view.size() / ALONE, ceil_div(view.rows, ROWS * this->joined_));
    this->tasks = most<int64_t>(1, least<int64_t>(4 * num_threads(), limit));
  }
  Part part(int64_t task) const { return {0, this->v.features, 0, 1, begin(task), begin(task + 1)}; }
  Part all() const { return {0, this->v.features, 0, 1, 0, this->v.rows}; }

 private:
  int64_t begin(int64_t task) const {
    int64_t unit = ROWS * this->joined_;
    return least(this->v.rows, ceil_div(ceil_div(this->v.rows, unit) * task, this->tasks) * unit);
  }
};

// Groups, some of them in each part.
template <class E>
class Groups : public Rows<E> {
 public:
  static constexpr bool WHOLE = false, FEW_ROWS = true;

  Groups(const View& view, int64_t, bool) : Rows<E>(view, 1) {
    if (!this->alone) this->tasks = least<int64_t>(view.groups, 4 * num_threads());
    block_ = ceil_div(view.groups, this->tasks);
  }
  Part part(int64_t task) const {
    const View& v = this->v;
    return {0, v.features, least(v.groups, task * block_), least(v.groups, (task + 1) * block_), 0, v.group_rows()};
  }
  bool few_rows() const { return this->v.group_rows() > 0 && this->v.group_rows() <= ROWS; }
  void few_rows_moments(const Arrays<E, 1>& x, int64_t group, const Part&, double* mean, double* variance) const {
    this->template rows<1>(x, group, 0, this->v.group_rows(), 1,
                           [&](const Arrays<E, 1>* at, int64_t n, int64_t columns) {
                             batchnorm::few_rows_moments<E>(at, n, columns, mean, variance);
                           });
  }

 private:
  int64_t block_;
};

}  // namespace
}  // namespace batchnorm
