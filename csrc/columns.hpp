// Short runs: rows of blocks that are next to each other, with every value a column of its own. So long stretches are
// read, whatever is short: the runs of features in the middle, or the rows of a group with features last.
#pragma once

#include "weights.hpp"

namespace batchnorm {
namespace {

constexpr int64_t COLUMNS_STRETCH = 32 * 1024;  // bytes that should be read side by side
constexpr int64_t SHORT = 2048;                 // bytes of the rows of a group side by side that are so few
constexpr int64_t FEW = 16;                     // rows of a group, whose moments take longer than its data
constexpr int64_t WEIGHED = 4;                  // rows whose weights by column are held at a time

// x[rows][blocks][repeats][numbers], with moments for each number of each block. With features in the middle a block is
// a feature, and repeats are its values in a row; with features last a block is a group, its numbers are the features,
// and repeats are its rows next to each other.
template <class E>
class Columns {
 public:
  using Element = E;
  using Value = typename E::Value;
  static constexpr bool WHOLE = false, FEW_ROWS = false;

  static bool serves(const View& view) {
    if (view.inner > 1) return view.inner < 2 * W;
    if (view.groups == 1 || (view.span == 1 && view.group_rows() <= FEW && view.features >= 2 * W)) return false;
    return view.span * view.features * static_cast<int64_t>(sizeof(typename E::Stored)) <= SHORT;
  }

  Columns(const View& view, const Weights& weights, int64_t arrays, bool waits)
      : alone(view.size() < ALONE),
        all_groups(view.inner > 1),
        positions_(view, weights),
        one_block_(all_groups || view.shares_weights()),
        v(view),
        past_(goes_past_caches<E>(view)) {
    if (!all_groups) {
      v = {view.rows / (view.groups * view.span), 1, 1, view.groups, view.span * view.features};
      more_ = view.rows / view.span % view.groups;
    }
    numbers_ = all_groups ? 1 : view.features;
    features = v.features * numbers_;
    block_ = features_at_once<E>(v, (waits && all_groups ? v.rows : v.group_rows()) * arrays, COLUMNS_STRETCH, alone);
    tasks = ceil_div(v.features, block_);
  }

  bool alone;
  const bool all_groups;
  int64_t tasks, features;

  Part part(int64_t task) const {
    return {
        task * block_ * numbers_, least(v.features, (task + 1) * block_) * numbers_, 0, v.groups, 0, v.group_rows()};
  }

  int64_t columns(const Part& part) const { return part.features() / numbers_ * v.inner; }
  template <class T>
  void spread(const Part& part, T* values) const {
    if (v.inner == numbers_) return;
    for (int64_t b = part.features() / numbers_ - 1; b >= 0; b--) {  // from the end, for they lie at the beginning
      T *from = values + b * numbers_, *to = values + b * v.inner;
      if (numbers_ == 1) {
        fill(to, v.inner, T{*from});
      } else {
        for (int64_t c = 0; c < numbers_; c++) to[c] = from[c];
        for (int64_t k = numbers_; k < v.inner; k++) to[k] = to[k - numbers_];
      }
    }
  }

  template <class Body>
  void each_count(const Part& part, int64_t group, Body&& body) const {
    if (all_groups) return body(0, part.features(), group);
    int64_t first = part.begin_feature / numbers_;
    for (int64_t c = 0; positions_ && c < part.features(); c += numbers_) body(c, numbers_, first + c / numbers_);
    if (positions_) return;
    int64_t more = most<int64_t>(0, least(part.features(), more_ * numbers_ - part.begin_feature));
    if (more > 0) body(0, more, first);
    if (more < part.features()) body(more, part.features() - more, first + more / numbers_);
  }

  void origin(const Arrays<E, 1>& x, int64_t group, const Part& part, Value* origin) const {
    if (positions_) return weighed_origin(x, group, part, origin);
    Scratch scratch;
    double *sums = scratch.take<double>(columns(part)), *squares = scratch.take<double>(columns(part));
    int64_t some = least(v.group_rows(group), FIRST);
    fill(sums, columns(part), 0.0);
    rows<1>(x, group, part, some, [&](const Arrays<E, 1>* at, int64_t n, int64_t width) {
      sum_few_rows<MomentsFormula, E>(at, n, width, nullptr, sums, squares);
    });
    fold(part, sums);
    double share = 1 / static_cast<double>(most<int64_t>(some * (v.inner / numbers_), 1));
    for (int64_t c = 0; c < part.features(); c++) origin[c] = static_cast<Value>(sums[c] * share);
  }

  template <class Formula>
  void sums(const Arrays<E, Formula::ARRAYS>& from, int64_t group, const Part& part, const Value* origin,
            double* firsts, double* seconds) const {
    fill(firsts, columns(part), 0.0);
    fill(seconds, columns(part), 0.0);
    auto add = [&](auto formula) {
      return [&](auto* at, int64_t n, int64_t width) {
        sum_rows<decltype(formula), E>(at, n, width, origin, firsts, seconds);
      };
    };
    if (positions_)
      by_kind<Formula>(from, group, part, add(Formula{}), add(typename Formula::WithWeights{}),
                       [](const auto&, int64_t) {});
    else
      all_rows<Formula::ARRAYS>(from, group, part, add(Formula{}));
    fold(part, firsts);
    fold(part, seconds);
  }

  template <class Formula>
  void map(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, const Part& part,
           Value* const (&coefficients)[Formula::COEFFICIENTS]) const {
    auto write = [&](auto formula) {
      return [&](auto* at, int64_t n, int64_t width) {
        map_rows<decltype(formula), E>(at, n, width, past_, coefficients);
      };
    };
    if (positions_ && (Formula::WEIGHS || positions_.zeroed()))
      by_kind<Formula>(arrays, group, part, write(Formula{}), write(typename Formula::WithWeights{}),
                       [](const auto& row, int64_t width) {
                         std::memset(row.out, 0, static_cast<size_t>(width) * sizeof(*row.out));
                       });
    else
      all_rows<Formula::ARRAYS>(arrays, group, part, write(Formula{}));
    if (past_) fence();
  }

 private:
  void fold(const Part& part, double* sums) const {
    if (v.inner == numbers_) return;
    for (int64_t b = 0; b < part.features() / numbers_; b++)
      for (int64_t c = 0; c < numbers_; c++) {
        double sum = 0;
        for (int64_t k = c; k < v.inner; k += numbers_) sum += sums[b * v.inner + k];
        sums[b * numbers_ + c] = sum;
      }
  }

  // Calls body with up to ROWS of the first `count` rows at a time.
  template <int N, class Body>
  void rows(const Arrays<E, N>& arrays, int64_t group, const Part& part, int64_t count, Body&& body) const {
    for (int64_t begin = 0; begin < count; begin += ROWS) {
      Arrays<E, N> at[ROWS];
      int64_t n = least(ROWS, count - begin);
      for (int64_t i = 0; i < n; i++) at[i] = row(arrays, group, part, begin + i);
      body(at, n, columns(part));
    }
  }
  // The same with all rows, of which the last has only the first blocks where some groups have more.
  template <int N, class Body>
  void all_rows(const Arrays<E, N>& arrays, int64_t group, const Part& part, Body&& body) const {
    rows<N>(arrays, group, part, v.group_rows(group), body);
    int64_t more = least(columns(part), (more_ - part.begin_feature / numbers_) * v.inner);
    if (more <= 0) return;
    Arrays<E, N> last = row(arrays, group, part, v.rows);
    body(&last, 1, more);
  }
  template <int N>
  Arrays<E, N> row(const Arrays<E, N>& arrays, int64_t group, const Part& part, int64_t i) const {
    return arrays.at((row_of(v, group, i) * v.features + part.begin_feature / numbers_) * v.inner);
  }

  // Rows of a part of a group, and the columns of one.
  int64_t row_count(int64_t group, const Part& part) const {
    return v.group_rows(group) + (more_ > part.begin_feature / numbers_);
  }
  int64_t width(int64_t i, const Part& part) const {
    int64_t all = columns(part);
    return all_groups || i < v.rows ? all : least(all, (more_ - part.begin_feature / numbers_) * v.inner);
  }
  // The first position of a row, and how many it has: those of all repeats of all blocks, or of one block where all
  // have the same.
  int64_t position(int64_t group, const Part& part, int64_t i) const {
    if (all_groups) return positions_.at(group, i);
    return (one_block_ ? i : i * v.features + part.begin_feature / numbers_) * repeats();
  }
  int64_t position_count(int64_t columns) const { return one_block_ ? repeats() : columns / numbers_; }
  int64_t repeats() const { return v.inner / numbers_; }

  // The same by what rows weigh: `plain` for those that weigh 1; `weighted` for the others, with a weight for each
  // column; for those that are neither read nor anything but 0, dropped(row, width).
  template <class Formula, class Plain, class WithWeights, class Dropped>
  void by_kind(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, const Part& part, Plain&& plain,
               WithWeights&& weighted, Dropped&& dropped) const {
    constexpr int N = Formula::ARRAYS;
    const bool reads_dropped = Formula::READS_DROPPED && !positions_.zeroed();
    const int64_t all = columns(part);
    Scratch scratch;
    Value *weights = scratch.take<Value>(WEIGHED * all), *row_weights = scratch.take<Value>(all);
    Arrays<E, N> at[ROWS];
    Weighted<E, N> weighed[WEIGHED];
    const int64_t rows = row_count(group, part), full = least(ROWS, rows), full_weighed = least(WEIGHED, rows);
    int64_t n = 0, m = 0;
    for (int64_t i = 0; i < rows; i++) {
      int64_t columns = width(i, part), begin = position(group, part, i);
      int64_t count = position_count(columns);
      auto from = row(arrays, group, part, i);
      Kind kind = positions_.kind(begin, count);
      if (kind == Kind::dropped && !reads_dropped) {
        dropped(from, columns);
      } else if (kind == Kind::plain) {
        if (columns < all)
          plain(&from, 1, columns);
        else
          at[n++] = from;
        if (n == full) plain(at, n, all), n = 0;
      } else {
        Value* to = weights + m * all;
        positions_.read(begin, count, row_weights);
        for (int64_t c = 0; c < columns; c += count * numbers_)
          for (int64_t k = 0; k < count; k++) fill(to + c + k * numbers_, numbers_, row_weights[k]);
        weighed[m] = {from, to, true, positions_.zeroed()};
        if (columns < all)
          weighted(weighed + m, 1, columns);
        else
          m++;
        if (m == full_weighed) weighted(weighed, m, all), m = 0;
      }
    }
    if (n > 0) plain(at, n, all);
    if (m > 0) weighted(weighed, m, all);
  }

  // An origin from the first values of each block that weigh anything.
  void weighed_origin(const Arrays<E, 1>& x, int64_t group, const Part& part, Value* origin) const {
    for (int64_t c0 = 0; c0 < part.features(); c0 += numbers_) {
      Part block = part;
      block.begin_feature += c0;
      block.end_feature = block.begin_feature + numbers_;
      fill(origin + c0, numbers_, Value{0});
      int64_t n = 0;
      for (int64_t i = 0; i < row_count(group, block) && n < FIRST; i++) {
        int64_t begin = position(group, block, i);
        if (positions_.kind(begin, repeats()) == Kind::dropped) continue;
        auto from = row(x, group, block, i);
        for (int64_t k = 0; k < repeats() && n < FIRST; k++) {
          if (positions_.kind(begin + k) == Kind::dropped) continue;
          n++;
          for (int64_t c = 0; c < numbers_; c++) {
            Value distance = E::load_single(from.in[0] + k * numbers_ + c) - origin[c0 + c];
            origin[c0 + c] += distance / static_cast<Value>(n);
          }
        }
      }
    }
  }

  const Positions positions_;
  const bool one_block_;                // whether all blocks have the same positions
  View v;                               // with blocks for features
  int64_t numbers_, block_, more_ = 0;  // the last: groups that have more samples than the others
  bool past_;
};

}  // namespace
}  // namespace batchnorm
