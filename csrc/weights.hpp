// What positions weigh: of which kind they are, in which stretches, and how many values moments are of.
#pragma once

#include "coefficients.hpp"
#include "formulas.hpp"
#include "parts.hpp"

namespace batchnorm {
namespace {

enum class Kind { dropped, plain, weighted };  // weighing nothing, 1, or anything (some nothing, too)

struct Stretch {
  int64_t begin, end;
  Kind kind;
};

constexpr int64_t BLOCK = 64;        // positions that are of one kind, or weighted one by one
constexpr int64_t SHARED = 1 << 18;  // positions that a task counts

class Positions {
  template <class T>
  static Kind kind_of(T weight) {
    return !(weight > 0) ? Kind::dropped : weight == 1 ? Kind::plain : Kind::weighted;
  }
  // Calls body with a function that reads a weight.
  template <class Body>
  auto visit(Body&& body) const {
    const auto* data = static_cast<const char*>(weights_.data);
    switch (weights_.kind) {
      case Weights::bytes: return body([=](int64_t i) { return static_cast<uint8_t>(data[i] != 0); });
      case Weights::floats: return body([=](int64_t i) { return load_bits<float>(data + 4 * i); });
      default: return body([=](int64_t i) { return load_bits<double>(data + 8 * i); });
    }
  }

 public:
  Positions(const View& view, const Weights& weights)
      : v_(view), weights_(weights), adjacent_(view.groups == 1 || view.shares_weights()) {}

  explicit operator bool() const { return static_cast<bool>(weights_); }
  bool zeroed() const { return weights_.zeroed; }

  // The first position of row i of a group.
  int64_t at(int64_t group, int64_t i) const { return (adjacent_ ? i : row_of(v_, group, i)) * v_.inner; }

  Kind kind(int64_t i) const {
    return visit([&](auto at) { return kind_of(at(i)); });
  }

  // Of n positions side by side, if they are of one kind; else they are weighted.
  Kind kind(int64_t i, int64_t n) const {
    return visit([&](auto at) {
      int32_t plain = 0, dropped = 0;
      for (int64_t k = i; k < i + n; k++) {
        plain += kind_of(at(k)) == Kind::plain;
        dropped += kind_of(at(k)) == Kind::dropped;
      }
      return plain == n ? Kind::plain : dropped == n ? Kind::dropped : Kind::weighted;
    });
  }

  // The end of the rows of a group, from row i on, whose only position is of the kind of the first.
  int64_t same_rows(int64_t group, int64_t i, int64_t end) const {
    Kind first = kind(at(group, i));
    while (i < end) {
      int64_t begin = at(group, i), n = (adjacent_ ? end : least(end, (i / v_.span + 1) * v_.span)) - i, k = 0;
      if (first != Kind::weighted)
        while (k + BLOCK <= n && kind(begin + k, BLOCK) == first) k += BLOCK;
      while (k < n && kind(begin + k) == first) k++;
      i += k;
      if (k < n) break;
    }
    return i;
  }

  // Cuts n positions from the i-th on into at most ceil_div(n, BLOCK) stretches, and returns how many these are.
  int64_t stretches(int64_t i, int64_t n, Stretch* to) const {
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
      int64_t end = least(n, begin + BLOCK);
      Kind next = kind(i + begin, end - begin);
      if (count > 0 && to[count - 1].kind == next)
        to[count - 1].end = end;
      else
        to[count++] = {begin, end, next};
    }
    return count;
  }

  // What n positions from the i-th on weigh; 0 for what weighs nothing.
  template <class T>
  void read(int64_t i, int64_t n, T* to) const {
    visit([&](auto at) {
      for (int64_t k = 0; k < n; k++) to[k] = kind_of(at(i + k)) == Kind::dropped ? T{0} : static_cast<T>(at(i + k));
      return 0;
    });
  }

  // Adds what n positions from the i-th on weigh, and its squares.
  void add(int64_t i, int64_t n, double& sum, double& squares) const {
    constexpr int64_t LANES = 8;
    visit([&](auto at) {
      double sums[LANES] = {}, more[LANES] = {};
      auto take = [&](int64_t k, int64_t lane) {
        auto weight = static_cast<double>(at(i + k));
        weight = weight > 0 ? weight : 0;
        sums[lane] += weight;
        more[lane] += weight * weight;
      };
      int64_t k = 0;
      for (; k + LANES <= n; k += LANES)
        for (int64_t j = 0; j < LANES; j++) take(k + j, j);
      for (; k < n; k++) take(k, 0);
      for (int64_t j = 0; j < LANES; j++) sum += sums[j], squares += more[j];
      return 0;
    });
  }

 private:
  const View& v_;
  const Weights weights_;
  const bool adjacent_;  // whether the positions of a group lie side by side
};

// How many values the moments of each group are of: known from the view, or sums of weights.
class Counts {
 public:
  // `given` from a forward pass, or to be counted.
  Counts(Scratch& scratch, const View& view, const Weights& weights, const Values& given = {})
      : v_(view), sums_(nullptr), squares_(nullptr) {
    if (!weights) return;
    int64_t n = v_.counts();
    sums_ = scratch.take<double>(n);
    if (given) {
      read(given, 0, n, sums_);
      return;
    }
    squares_ = scratch.take<double>(n);
    count(Positions(view, weights));
  }

  double operator()(int64_t group) const {
    if (sums_ == nullptr) return static_cast<double>(v_.group_rows(group) * v_.inner);
    return sums_[v_.shares_weights() ? 0 : group];
  }
  void write(const Values& sums, const Values& squares) const {
    for (int64_t g = 0; g < v_.counts(); g++) {
      double count = (*this)(g);
      if (sums) sums.set(g, count);
      if (squares) squares.set(g, squares_ == nullptr ? count : squares_[g]);
    }
  }

 private:
  void count(const Positions& positions) {
    int64_t groups = v_.counts();
    fill(sums_, groups, 0.0);
    fill(squares_, groups, 0.0);
    if (groups > 1) {
      int64_t sample = v_.span * v_.inner;
      run_tasks(groups, v_.positions() <= SHARED, [&](int64_t g) {
        for (int64_t i = g; i < v_.rows / v_.span; i += groups)
          positions.add(i * sample, sample, sums_[g], squares_[g]);
      });
      return;
    }
    int64_t n = v_.positions(), tasks = ceil_div(n, SHARED);
    Scratch scratch;
    double *sums = scratch.take<double>(tasks), *squares = scratch.take<double>(tasks);
    run_tasks(tasks, tasks == 1, [&](int64_t task) {
      sums[task] = squares[task] = 0;
      positions.add(task * SHARED, least(SHARED, n - task * SHARED), sums[task], squares[task]);
    });
    for (int64_t task = 0; task < tasks; task++) sums_[0] += sums[task], squares_[0] += squares[task];
  }

  const View& v_;
  double *sums_, *squares_;
};

}  // namespace
}  // namespace batchnorm
