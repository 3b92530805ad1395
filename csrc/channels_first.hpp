// Features in the middle, in runs of at least two vectors: a part is a block of features, all their values, which stay
// in a cache.
#pragma once

#include "parts.hpp"

namespace batchnorm {
namespace {

constexpr int64_t STRETCH = 64 * 1024;  // bytes that should be read side by side
constexpr int64_t BURST = 1024;         // bytes of one place that are read before it is the next one's turn
constexpr int64_t CARRIED =
    4096;  // values of a feature that sums are carried over in Value, before they go to a double

template <class E>
class ChannelsFirst {
 public:
  using Element = E;
  using Value = typename E::Value;
  static constexpr bool WHOLE = false;     // whether the parts are pieces of one group
  static constexpr bool FEW_ROWS = false;  // whether groups may be of a few rows

  // `arrays` are read at once; with `waits` all groups of a part are measured before any is written.
  ChannelsFirst(const View& view, int64_t arrays, bool waits)
      : v(view), alone(v.size() < ALONE), features(v.features), past_(goes_past_caches<E>(v)) {
    block_ = features_at_once<E>(v, (waits ? v.rows : v.group_rows()) * arrays, STRETCH, alone);
    tasks = ceil_div(v.features, block_);
  }

  const View& v;
  const bool alone, all_groups = true;  // whether a part has all groups of its features
  int64_t tasks, features;              // the latter those of a group

  Part part(int64_t task) const {
    return {task * block_, least(v.features, (task + 1) * block_), 0, v.groups, 0, v.group_rows()};
  }

  // Coefficients by feature are spread over as many columns, in room for these, and sums folded. Here columns are
  // features.
  int64_t columns(const Part& part) const { return part.features(); }
  template <class T>
  void spread(const Part&, T*) const {}

  // An origin near the data, by feature.
  void origin(const Arrays<E, 1>& x, int64_t group, const Part& part, Value* origin) const {
    int64_t some = least<int64_t>(v.inner, WAYS * W);
    for (int64_t c = 0; c < part.features(); c++) {
      typename E::Vector sum = {}, squares = {};
      if (part.rows()) sum_run<MomentsFormula, E>(x.at(place(group, 0, part.begin_feature + c)), some, 0, sum, squares);
      origin[c] = static_cast<Value>(total(sum) / static_cast<double>(some));
    }
  }

  // The formula's sums, by feature; the origin is spread. Sums are carried in vectors for as long as that is exact
  // enough, then in doubles. Short runs of several rows take turns: while some of one row are worked on, the processor
  // fetches what follows in the others.
  template <class Formula>
  void sums(const Arrays<E, Formula::ARRAYS>& from, int64_t group, const Part& part, const Value* origin,
            double* firsts, double* seconds) const {
    using V = typename E::Vector;
    int64_t width = part.features(), rows = part.rows(), bytes = v.inner * static_cast<int64_t>(sizeof(*from.in[0]));
    int64_t carried = most<int64_t>(1, least(ROWS, CARRIED / v.inner));  // rows
    int64_t burst = bytes < BURST ? ceil_div(BURST, bytes) : width;      // features
    Scratch scratch;
    V *first = scratch.take<V>(width), *second = scratch.take<V>(width);
    fill(first, width, V{});
    fill(second, width, V{});
    fill(firsts, width, 0.0);
    fill(seconds, width, 0.0);
    auto add_run = [&](int64_t i, int64_t c, const Arrays<E, Formula::ARRAYS>& run) {
      bool full = (i + 1) % carried == 0 || i + 1 == rows;
      for (int64_t begin = 0; begin < v.inner; begin += CARRIED) {
        sum_run<Formula, E>(run.at(begin), least(CARRIED, v.inner - begin), origin[c], first[c], second[c]);
        if (!full) continue;
        firsts[c] += total(first[c]);
        seconds[c] += total(second[c]);
        first[c] = second[c] = V{};
      }
    };
    for (int64_t begin = 0; begin < rows; begin += PLACES)
      for (int64_t c = 0; c < width; c += burst)
        for (int64_t i = begin; i < least(rows, begin + PLACES); i++) {
          auto run = from.at(place(group, i, part.begin_feature + c));
          for (int64_t k = c; k < least(width, c + burst); k++, run = run.at(v.inner)) add_run(i, k, run);
        }
  }

  // Writes what the formula makes of a group's values; coefficients are spread.
  template <class Formula>
  void map(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, const Part& part,
           Value* const (&coefficients)[Formula::COEFFICIENTS]) const {
    for (int64_t i = part.rows() - 1; i >= 0; i--) {  // backwards: the end is what the cache still has
      auto at = arrays.at(place(group, i, part.begin_feature));
      for (int64_t c = 0; c < part.features(); c++, at = at.at(v.inner)) {
        Value by[Formula::COEFFICIENTS];
        for (int k = 0; k < Formula::COEFFICIENTS; k++) by[k] = coefficients[k][c];
        map_run<Formula, E>(at, v.inner, past_, by);
      }
    }
    if (past_) fence();
  }

 private:
  int64_t place(int64_t group, int64_t i, int64_t c) const { return (row_of(v, group, i) * v.features + c) * v.inner; }

  bool past_;
  int64_t block_;
};

}  // namespace
}  // namespace batchnorm
