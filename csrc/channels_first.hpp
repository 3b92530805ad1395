// Features in the middle, in runs of at least two vectors: a part is a block of features, all their values, which stay
// in a cache.
#pragma once

#include "weights.hpp"

namespace batchnorm {
namespace {

constexpr int64_t STRETCH = 64 * 1024;  // bytes that should be read side by side
constexpr int64_t BURST = 1024;         // bytes of one place that are read before it is the next one's turn
constexpr int64_t LONG_STRETCH = 4096;  // bytes of a stretch by itself that are worth writing past the caches
constexpr int64_t FETCHED = 16 << 20;   // bytes to read of which most are in no cache when a call begins
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
  ChannelsFirst(const View& view, const Weights& weights, int64_t arrays, bool waits)
      : v(view),
        alone(v.size() < ALONE),
        features(v.features),
        positions_(view, weights),
        past_(goes_past_caches<E>(v)),
        waits_(waits),
        fetches_(arrays * v.size() * static_cast<int64_t>(sizeof(typename E::Stored)) > FETCHED) {
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

  // Calls body(c, n, group) for n features from c on whose values are as many as those of one group.
  template <class Body>
  void each_count(const Part& part, int64_t group, Body&& body) const {
    body(0, part.features(), group);
  }

  // An origin near the data, by feature.
  void origin(const Arrays<E, 1>& x, int64_t group, const Part& part, Value* origin) const {
    int64_t row = 0, begin = 0, some = least<int64_t>(v.inner, WAYS * W), rows = v.group_rows(group);
    if (positions_) some = first_weighing(group, rows, row, begin);
    for (int64_t c = 0; c < part.features(); c++) {
      typename E::Vector sum = {}, squares = {};
      if (row < rows)
        sum_run<MomentsFormula, E>(x.at(place(group, row, part.begin_feature + c) + begin), some, 0, sum, squares);
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
    int64_t width = part.features(), rows = v.group_rows(group);
    int64_t bytes = v.inner * static_cast<int64_t>(sizeof(*from.in[0]));
    int64_t carried = most<int64_t>(1, least(ROWS, CARRIED / v.inner));  // rows
    int64_t burst = bytes < BURST ? ceil_div(BURST, bytes) : width;      // features
    Scratch scratch;
    V *first = scratch.take<V>(width), *second = scratch.take<V>(width);
    fill(first, width, V{});
    fill(second, width, V{});
    fill(firsts, width, 0.0);
    fill(seconds, width, 0.0);
    auto flush = [&](int64_t c) {
      firsts[c] += total(first[c]);
      seconds[c] += total(second[c]);
      first[c] = second[c] = V{};
    };
    auto add_run = [&](bool full, int64_t c, const Arrays<E, Formula::ARRAYS>& run) {
      for (int64_t begin = 0; begin < v.inner; begin += CARRIED) {
        sum_run<Formula, E>(run.at(begin), least(CARRIED, v.inner - begin), origin[c], first[c], second[c]);
        if (full) flush(c);
      }
    };
    const bool reads_dropped = Formula::READS_DROPPED && !positions_.zeroed();
    auto add_stretches = [&](bool full, int64_t c, const Arrays<E, Formula::ARRAYS>& run, const Row& row) {
      each_stretch<Formula>(
          run, row, CARRIED,
          [&](const auto& at, int64_t n, auto formula) {
            sum_run<decltype(formula), E>(at, n, origin[c], first[c], second[c]);
            if (full) flush(c);
          },
          [&](const auto& at, int64_t n, auto formula) {
            if (reads_dropped) sum_run<decltype(formula), E>(at, n, origin[c], first[c], second[c]);
          });
      if (full) flush(c);
    };
    Row weighed[PLACES];
    for (Row& row : weighed)
      if (positions_) row = Row(scratch, v.inner);
    for (int64_t begin = 0; begin < rows; begin += PLACES) {
      int64_t end = least(rows, begin + PLACES);
      for (int64_t i = begin; positions_ && i < end; i++) weighed[i - begin].read(positions_, group, i, v.inner);
      for (int64_t c = 0; c < width; c += burst)
        for (int64_t i = begin; i < end; i++) {
          auto run = from.at(place(group, i, part.begin_feature + c));
          bool full = (i + 1) % carried == 0 || i + 1 == rows;
          for (int64_t k = c; k < least(width, c + burst); k++, run = run.at(v.inner))
            if (positions_ && !weighed[i - begin].plain())
              add_stretches(full, k, run, weighed[i - begin]);
            else
              add_run(full, k, run);
        }
    }
  }

  // Writes what the formula makes of a group's values; coefficients are spread.
  template <class Formula>
  void map(const Arrays<E, Formula::ARRAYS>& arrays, int64_t group, const Part& part,
           Value* const (&coefficients)[Formula::COEFFICIENTS]) const {
    const bool weighs = positions_ && (Formula::WEIGHS || positions_.zeroed());
    Scratch scratch;
    Row row;
    if (weighs) row = Row(scratch, v.inner);
    for (int64_t i = v.group_rows(group) - 1; i >= 0; i--) {  // backwards: the end is what the cache still has
      auto at = arrays.at(place(group, i, part.begin_feature));
      const int64_t ahead = fetches_ ? next_place(group, i, part) : 0;
      if (weighs) row.read(positions_, group, i, v.inner);
      if (!weighs || row.plain()) {
        map_runs<Formula, E>(at, part.features(), v.inner, past_, ahead, coefficients);
        continue;
      }
      for (int64_t c = 0; c < part.features(); c++, at = at.at(v.inner)) {
        Value* by[Formula::COEFFICIENTS];
        for (int k = 0; k < Formula::COEFFICIENTS; k++) by[k] = coefficients[k] + c;
        auto write = [&](const auto& from, int64_t n, auto formula) {
          const bool past = past_ && n * static_cast<int64_t>(sizeof(*from.out)) >= LONG_STRETCH;
          map_runs<decltype(formula), E>(from, 1, n, past, ahead, by);
        };
        each_stretch<Formula>(at, row, v.inner, write, [&](const auto& from, int64_t n, auto formula) {
          if (positions_.zeroed())
            std::memset(from.out, 0, static_cast<size_t>(n) * sizeof(*from.out));
          else
            write(from, n, formula);
        });
      }
    }
    if (past_) fence();
  }

 private:
  // What the positions of a row weigh, and in which stretches.
  struct Row {
    Stretch* stretches = nullptr;
    Value* weights = nullptr;  // where a stretch is not of one kind
    int64_t count = 0;
    Row() = default;
    Row(Scratch& scratch, int64_t inner)
        : stretches(scratch.take<Stretch>(ceil_div(inner, BLOCK))), weights(scratch.take<Value>(inner)) {}

    void read(const Positions& positions, int64_t group, int64_t i, int64_t inner) {
      int64_t begin = positions.at(group, i);
      count = positions.stretches(begin, inner, stretches);
      for (int64_t k = 0; k < count; k++)
        if (stretches[k].kind != Kind::plain)
          positions.read(begin + stretches[k].begin, stretches[k].end - stretches[k].begin,
                         weights + stretches[k].begin);
    }
    bool plain() const { return count == 1 && stretches[0].kind == Kind::plain; }
  };

  // Calls body(from, n, formula) for the stretches of a run that weigh anything, of at most `longest` values, and
  // dropped for the others.
  template <class Formula, class Body, class Dropped>
  void each_stretch(const Arrays<E, Formula::ARRAYS>& run, const Row& row, int64_t longest, Body&& body,
                    Dropped&& dropped) const {
    using WithWeights = typename Formula::WithWeights;
    for (int64_t k = 0; k < row.count; k++) {
      const Stretch& stretch = row.stretches[k];
      for (int64_t begin = stretch.begin; begin < stretch.end; begin += longest) {
        int64_t n = least(longest, stretch.end - begin);
        if (stretch.kind == Kind::plain) {
          body(run.at(begin), n, Formula{});
          continue;
        }
        Weighted<E, Formula::ARRAYS> from{run.at(begin), row.weights + begin, true, positions_.zeroed()};
        if (stretch.kind == Kind::weighted)
          body(from, n, WithWeights{});
        else
          dropped(from, n, WithWeights{});
      }
    }
  }

  // The first values of a group that weigh anything, side by side: how many, at most WAYS·W, in which row, from where.
  int64_t first_weighing(int64_t group, int64_t rows, int64_t& row, int64_t& begin) const {
    for (row = 0; row < rows; row++) {
      int64_t at = positions_.at(group, row);
      for (begin = 0; begin < v.inner; begin++) {
        if (begin % BLOCK == 0)
          while (begin + BLOCK <= v.inner && positions_.kind(at + begin, BLOCK) == Kind::dropped) begin += BLOCK;
        int64_t n = 0;
        while (n < least<int64_t>(v.inner - begin, WAYS * W) && positions_.kind(at + begin + n) != Kind::dropped) n++;
        if (n > 0) return n;
      }
    }
    return 1;
  }

  int64_t place(int64_t group, int64_t i, int64_t c) const { return (row_of(v, group, i) * v.features + c) * v.inner; }

  // How far ahead lies what a thread is likely to read next, when it writes a row of a group: the same row of the
  // group that follows, or of the part that is its next if all threads are as fast; 0 where there is none.
  int64_t next_place(int64_t group, int64_t i, const Part& part) const {
    int64_t c = part.begin_feature, here = place(group, i, c), next = c + num_threads() * block_;
    if (!waits_ && group + 1 < part.end_group) return place(group + 1, least(i, v.group_rows(group + 1) - 1), c) - here;
    return next < v.features ? place(waits_ ? group : part.begin_group, i, next) - here : 0;
  }

  const Positions positions_;
  const bool past_, waits_, fetches_;
  int64_t block_;
};

}  // namespace
}  // namespace batchnorm
