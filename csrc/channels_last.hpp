// Features last: rows of all features. Parts are pieces of a whole batch, or groups.
#pragma once

#include "weights.hpp"

namespace batchnorm {
namespace {

constexpr int64_t JOINED = 512;  // features up to which rows are joined
constexpr int64_t LONG = 16;     // rows that weigh 1 from which they are gone over where they lie

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

  template <class Body>
  void each_count(const Part& part, int64_t group, Body&& body) const {
    body(0, part.features(), group);
  }

  void origin(const Arrays<E, 1>& x, int64_t group, const Part& part, Value* origin) const {
    Arrays<E, 1> at[FIRST];
    int64_t n = 0, end = end_row(group, part);
    for (int64_t i = part.begin_row; i < end && n < FIRST; i++) {
      if (positions_ && positions_.kind(positions_.at(group, i)) == Kind::dropped)
        i = positions_.same_rows(group, i, end) - 1;
      else
        at[n++] = x.at(row_of(v, group, i) * v.features);
    }
    Scratch scratch;
    double *sums = scratch.take<double>(v.features), *squares = scratch.take<double>(v.features);
    sum_few_rows<MomentsFormula, E>(at, n, v.features, nullptr, sums, squares);
    double share = 1 / static_cast<double>(most<int64_t>(n, 1));
    for (int64_t c = 0; c < v.features; c++) origin[c] = static_cast<Value>(sums[c] * share);
  }

  template <class Formula>
  void sums(const Arrays<E, Formula::ARRAYS>& from, int64_t group, const Part& part, const Value* origin,
            double* firsts, double* seconds) const {
    int64_t begin = part.begin_row, end = end_row(group, part);
    if (!positions_ && v.groups > 1 && end > begin && end - begin <= ROWS)
      return rows<Formula::ARRAYS>(from, group, begin, end, 1, [&](auto* at, int64_t n, int64_t columns) {
        sum_few_rows<Formula, E>(at, n, columns, origin, firsts, seconds);
      });
    fill(firsts, columns(part), 0.0);
    fill(seconds, columns(part), 0.0);
    auto add = [&](auto formula) {
      return [&](auto* at, int64_t n, int64_t columns) {
        sum_rows<decltype(formula), E>(at, n, columns, origin, firsts, seconds);
      };
    };
    if (positions_)
      by_kind<Formula, Formula::ARRAYS>(from, group, begin, end, add(Formula{}), add(typename Formula::WithWeights{}),
                                        [](int64_t, int64_t) {});
    else
      in_turn<Formula::ARRAYS, Formula::ARRAYS>(from, group, begin, end, add(Formula{}));
    for (int64_t c = v.features; c < columns(part); c += v.features)
      for (int64_t k = 0; k < v.features; k++) firsts[k] += firsts[c + k], seconds[k] += seconds[c + k];
  }

  template <class Formula>
  void map(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, const Part& part,
           Value* const (&coefficients)[Formula::COEFFICIENTS]) const {
    constexpr int MEMORIES = Formula::ARRAYS + 1;
    int64_t begin = part.begin_row, end = end_row(group, part);
    auto write = [&](auto formula) {
      return [&](auto* at, int64_t n, int64_t columns) {
        map_rows<decltype(formula), E>(at, n, columns, past_, coefficients);
      };
    };
    if (positions_ && (Formula::WEIGHS || positions_.zeroed()))
      by_kind<Formula, MEMORIES>(arrays, group, begin, end, write(Formula{}), write(typename Formula::WithWeights{}),
                                 [&](int64_t from, int64_t to) {
                                   size_t row = static_cast<size_t>(v.features) * sizeof(*arrays.out);
                                   for (int64_t i = from; i < to; i++)
                                     std::memset(arrays.out + row_of(v, group, i) * v.features, 0, row);
                                 });
    else
      in_turn<Formula::ARRAYS, MEMORIES>(arrays, group, begin, end, write(Formula{}));
    if (past_) fence();
  }

 protected:
  Rows(const View& view, const Weights& weights, int64_t joined)
      : v(view),
        alone(v.size() < ALONE),
        features(v.features),
        positions_(view, weights),
        joined_(joined),
        past_(goes_past_caches<E>(v)) {}

  // The end of the rows of a group that are of a part.
  int64_t end_row(int64_t group, const Part& part) const { return least(part.end_row, v.group_rows(group)); }

  // Calls body with up to ROWS rows at a time, `joined` rows seen as one.
  template <int N, class Body>
  void rows(const Arrays<E, N>& arrays, int64_t group, int64_t begin, int64_t end, int64_t joined, Body&& body) const {
    Arrays<E, N> at[ROWS];
    int64_t n = 0;
    for (int64_t i = begin; i < end; i += joined) at[n++] = arrays.at(row_of(v, group, i) * v.features);
    if (n > 0) body(at, n, v.features * joined);
  }

  const Positions positions_;
  const int64_t joined_;  // at most ROWS

 private:
  // The same for all rows from `begin` on, joined as far as that goes, from several places in turn: while rows of one
  // are worked on, the processor fetches what follows in the others. MEMORIES are the arrays read and written.
  template <int N, int MEMORIES, class Body>
  void in_turn(const Arrays<E, N>& arrays, int64_t group, int64_t begin, int64_t end, Body&& body) const {
    constexpr int64_t TURNS = MEMORIES < 3 ? PLACES : PLACES / 2, LENGTH = ROWS / TURNS;
    int64_t length = (end - begin) / joined_ / TURNS;
    for (int64_t first = 0; first < length; first += LENGTH) {
      Arrays<E, N> at[ROWS];
      int64_t n = 0;
      for (int64_t j = first; j < least(length, first + LENGTH); j++)
        for (int64_t place = 0; place < TURNS; place++)
          at[n++] = arrays.at(row_of(v, group, begin + (place * length + j) * joined_) * v.features);
      body(at, n, v.features * joined_);
    }
    int64_t joined_end = begin + (end - begin) / joined_ * joined_;
    rows<N>(arrays, group, begin + length * TURNS * joined_, joined_end, joined_, body);
    rows<N>(arrays, group, joined_end, end, 1, body);
  }

  // The same by what rows weigh: `plain` for those that weigh 1, or anything where the formula makes no difference of
  // it; `weighted` for the others; for what is neither read nor anything but 0, dropped(begin, end).
  template <class Formula, int MEMORIES, class Plain, class WithWeights, class Dropped>
  void by_kind(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, int64_t begin, int64_t end, Plain&& plain,
               WithWeights&& weighted, Dropped&& dropped) const {
    constexpr int N = Formula::ARRAYS;
    const bool reads_dropped = Formula::READS_DROPPED && !positions_.zeroed();
    Arrays<E, N> at[ROWS];
    Weighted<E, N> weighed[ROWS];
    Value weights[ROWS];
    int64_t n = 0, m = 0;
    for (int64_t i = begin; i < end;) {
      Kind kind = positions_.kind(positions_.at(group, i));
      int64_t next = positions_.same_rows(group, i, end);
      if (kind == Kind::dropped && !reads_dropped) {
        dropped(i, next);
        i = next;
      }
      bool weighs = kind == Kind::weighted ? Formula::WEIGHS : kind == Kind::dropped;
      if (!weighs && next - i >= LONG) {
        in_turn<N, MEMORIES>(arrays, group, i, next, plain);
        i = next;
      }
      while (i < next) {
        int64_t some = least(LONG, next - i);
        int64_t& taken = weighs ? m : n;
        if (taken + some > ROWS) {
          weighs ? weighted(weighed, m, v.features) : plain(at, n, v.features);
          taken = 0;
        }
        for (int64_t end_of_some = i + some; i < end_of_some; i++, taken++) {
          auto row = arrays.at(row_of(v, group, i) * v.features);
          if (weighs) {
            positions_.read(positions_.at(group, i), 1, weights + m);
            weighed[m] = {row, weights + m, false, positions_.zeroed()};
          } else {
            at[n] = row;
          }
        }
      }
    }
    if (n > 0) plain(at, n, v.features);
    if (m > 0) weighted(weighed, m, v.features);
  }

  bool past_;
};

// A whole batch, cut into pieces whose sums are put together.
template <class E>
class WholeBatch : public Rows<E> {
 public:
  static constexpr bool WHOLE = true, FEW_ROWS = false;

  WholeBatch(const View& view, const Weights& weights, int64_t, bool)
      : Rows<E>(view, weights, view.size() < ALONE ? 1 : most<int64_t>(1, least(ROWS, JOINED / view.features))) {
    if (this->alone) return;
    int64_t limit = least(view.size() / ALONE, ceil_div(view.rows, ROWS * this->joined_));
    this->tasks = most<int64_t>(1, least<int64_t>(4 * num_threads(), limit));
  }
  Part part(int64_t task) const { return {0, this->v.features, 0, 1, begin(task), begin(task + 1)}; }
  Part all() const { return {0, this->v.features, 0, 1, 0, this->v.rows}; }
  double count(const Part& part) const {
    double sum = 0, squares = 0;
    if (!this->positions_) return static_cast<double>(part.rows());
    this->positions_.add(part.begin_row, part.rows(), sum, squares);
    return sum;
  }

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

  Groups(const View& view, const Weights& weights, int64_t, bool) : Rows<E>(view, weights, 1) {
    if (!this->alone) this->tasks = least<int64_t>(view.groups, 4 * num_threads());
    block_ = ceil_div(view.groups, this->tasks);
  }
  Part part(int64_t task) const {
    const View& v = this->v;
    return {0, v.features, least(v.groups, task * block_), least(v.groups, (task + 1) * block_), 0, v.group_rows()};
  }
  bool few_rows(int64_t group) const {
    return !this->positions_ && this->v.group_rows(group) > 0 && this->v.group_rows(group) <= ROWS;
  }
  void few_rows_moments(const Arrays<E, 1>& x, int64_t group, const Part&, double* mean, double* variance) const {
    this->template rows<1>(x, group, 0, this->v.group_rows(group), 1,
                           [&](const Arrays<E, 1>* at, int64_t n, int64_t columns) {
                             batchnorm::few_rows_moments<E>(at, n, columns, mean, variance);
                           });
  }

 private:
  int64_t block_;
};

}  // namespace
}  // namespace batchnorm
