// The loops over memory: over runs of one feature, and over rows of columns, each for every formula.
#pragma once

#include "formulas.hpp"

namespace batchnorm {
namespace {

constexpr int WAYS = 4;  // vectors that do not wait for each other

// Results are written to the caches or past them; past them only whole lines are worth it. Then there is so much data
// that what is read next is worth fetching meanwhile.
template <class E>
struct ToCaches {
  static constexpr bool FETCHES = false;
  static void store(typename E::Stored* p, typename E::Vector v) { E::store(p, v); }
};
template <class E>
struct PastCaches {
  static constexpr bool FETCHES = false;
  static void store(typename E::Stored* p, typename E::Vector v) { E::stream(p, v); }
};
template <class E>
struct PastCachesWhileFetching : PastCaches<E> {
  static constexpr bool FETCHES = true;
};
constexpr int64_t LINE = 64;
template <class E>
constexpr int64_t PER_LINE = LINE / sizeof(typename E::Stored);
bool begins_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % LINE == 0; }

template <class V>
V everything(V v) {
  return v;
}

// ---- Runs: n values of one feature side by side. What is left over at the end of a run is taken from a whole vector
// that ends there.

// Adds the formula's terms to the elements of two sums.
template <class Formula, class E>
[[gnu::always_inline]] inline void sum_run(const typename Formula::template From<E>& from, int64_t n,
                                           typename E::Value origin, typename E::Vector& first,
                                           typename E::Vector& second) {
  using L = VectorLanes<E>;
  using V = typename E::Vector;
  if (n < W) {
    typename E::Value s = 0, t = 0;
    for (int64_t i = 0; i < n; i++)
      Formula::template add<SingleLane<E>>(from, i, origin, everything<typename E::Value>, s, t);
    first[0] += s;
    second[0] += t;
    return;
  }
  V center = L::all(origin), sum = first, other = second;
  int64_t i = 0;
  if (n >= WAYS * W) {
    V s[WAYS] = {}, t[WAYS] = {};
    for (; i + WAYS * W <= n; i += WAYS * W)
      for (int k = 0; k < WAYS; k++) Formula::template add<L>(from, i + k * W, center, everything<V>, s[k], t[k]);
    sum += (s[0] + s[1]) + (s[2] + s[3]);
    other += (t[0] + t[1]) + (t[2] + t[3]);
  }
  for (; i + W <= n; i += W) Formula::template add<L>(from, i, center, everything<V>, sum, other);
  if (i < n) Formula::template add<L>(from, n - W, center, [&](V v) { return last_of(v, n - i); }, sum, other);
  first = sum;
  second = other;
}

// Stores what the formula makes of `runs` runs of n values, which may lie where it is stored. All lie side by side, and
// several have at least two vectors each: so vectors are stored from where one is aligned, and lanes of one where two
// runs meet have the coefficients of their own. Where results go past the caches, what lies `ahead` of the values is
// fetched into them, unless that is 0.
template <class Formula, class E>
void map_runs(const typename Formula::template From<E>& arrays, int64_t runs, int64_t n, bool past, int64_t ahead,
              typename E::Value* const (&coefficients)[Formula::COEFFICIENTS]) {
  using L = VectorLanes<E>;
  using V = typename E::Vector;
  constexpr int K = Formula::COEFFICIENTS;
  constexpr int64_t UNIT = most<int64_t>(W, PER_LINE<E>);
  auto* out = arrays.out;
  const int64_t size = runs * n;
  if (size < W) {
    typename E::Value by[K];
    for (int k = 0; k < K; k++) by[k] = *coefficients[k];
    for (int64_t i = 0; i < size; i++) E::store_single(out + i, Formula::template map<SingleLane<E>>(arrays, i, by));
    return;
  }
  struct Coefficients {
    V values[K];
  };
  const typename E::Value* all[K];
  for (int k = 0; k < K; k++) all[k] = coefficients[k];
  auto of_run = [&](int64_t run) {
    Coefficients by;
    for (int k = 0; k < K; k++) by.values[k] = L::all(all[k][run]);
    return by;
  };
  auto map = [&](int64_t i, const Coefficients& by) { return Formula::template map<L>(arrays, i, by.values); };
  auto write = [&](int64_t i, int64_t end, auto to) {
    auto fetch = [&](int64_t i, int64_t values) {
      if constexpr (decltype(to)::FETCHES)
        for (auto* in : arrays.in)
          for (int64_t k = 0; k < values; k += PER_LINE<E>) __builtin_prefetch(in + i + ahead + k, 0, 2);
    };
    for (int64_t run = i / n; i < end; run++) {
      const Coefficients by = of_run(run);
      int64_t left = (run + 1) * n - i, whole = least(end, i + left / W * W);
      left -= whole - i;
      for (; i + WAYS * W <= whole; i += WAYS * W) {
        V v[WAYS];
        for (int k = 0; k < WAYS; k++) v[k] = map(i + k * W, by);
        fetch(i, WAYS * W);
        for (int k = 0; k < WAYS; k++) to.store(out + i + k * W, v[k]);
      }
      for (; i < whole; i += W) {
        fetch(i, W);
        to.store(out + i, map(i, by));
      }
      if (left == 0 || i == end) continue;
      Coefficients mixed = of_run(run + 1);
      for (int k = 0; k < K; k++) mixed.values[k] = first_of(by.values[k], left, mixed.values[k]);
      to.store(out + i, map(i, mixed));
      i += W;
    }
  };
  const V head = map(0, of_run(0)), tail = map(size - W, of_run(runs - 1));  // before what they overlap is written
  int64_t line = 0;
  while (line < PER_LINE<E> && !begins_line(out + line)) line++;
  int64_t begin = line % W, end = size - (size - begin) % W;
  if (past && line < PER_LINE<E> && size >= 4 * WAYS * W) {
    int64_t lines_end = size - (size - line) % UNIT;
    write(begin, line, ToCaches<E>{});
    if (ahead == 0)
      write(line, lines_end, PastCaches<E>{});
    else
      write(line, lines_end, PastCachesWhileFetching<E>{});
    write(lines_end, end, ToCaches<E>{});
  } else {
    write(begin, end, ToCaches<E>{});
  }
  E::store(out, head);
  E::store(out + size - W, tail);
}

// ---- Rows: one value of every column side by side, at most ROWS of them, which may lie apart. Sums over them are
// carried in Value, and added to doubles.

constexpr int64_t ROWS = 64;
constexpr int64_t TILE = 1024;  // columns that sums are carried for at a time

// Rows at once spare loads and stores of sums and coefficients. Calls body(i, n) for n rows from i on, with n = ABREAST
// known when this is compiled as often as that goes.
template <int64_t ABREAST, class Body>
void abreast(int64_t rows, Body&& body) {
  int64_t i = 0;
  for (; i + ABREAST <= rows; i += ABREAST) body(i, Constant<ABREAST>{});
  for (; i < rows; i++) body(i, Constant<1>{});
}

template <class V>
void add_to(double* sums, V v) {
  store_bits(sums, load_bits<Doubles>(sums) + __builtin_convertvector(v, Doubles));
}

// Adds the formula's terms to `firsts` and `seconds`, by column.
template <class Formula, class E>
[[gnu::noinline]] void sum_rows(const typename Formula::template From<E>* rows, int64_t n, int64_t columns,
                                const typename E::Value* origin, double* firsts, double* seconds) {
  using L = VectorLanes<E>;
  using V = typename E::Vector;
  using Value = typename E::Value;
  alignas(sizeof(V)) Value first[TILE], second[TILE];
  int64_t vectors = columns / W * W, left = columns - vectors;
  for (int64_t tile = 0; tile < vectors; tile += TILE) {
    int64_t width = least(TILE, vectors - tile);
    for (int64_t c = 0; c < width; c++) first[c] = second[c] = 0;
    abreast<4>(n, [&](int64_t i, auto count) {
      typename Formula::template From<E>
          at[count.value];  // copied, for a compiler must take a store for one to the pointers
      for (int64_t k = 0; k < count.value; k++) at[k] = rows[i + k];
      for (int64_t c = 0; c < width; c += W) {
        V s = load_bits<V>(first + c), t = load_bits<V>(second + c), center = L::values(origin + tile + c);
#pragma GCC unroll 4
        for (int64_t k = 0; k < count.value; k++)
          Formula::template add<L>(at[k], tile + c, center, everything<V>, s, t);
        store_bits(first + c, s);
        store_bits(second + c, t);
      }
    });
    for (int64_t c = 0; c < width; c += W) {
      add_to(firsts + tile + c, load_bits<V>(first + c));
      add_to(seconds + tile + c, load_bits<V>(second + c));
    }
  }
  if (left > 0 && vectors > 0) {
    V s = {}, t = {}, center = L::values(origin + columns - W);
    auto end = [&](V v) { return last_of(v, left); };
    for (int64_t i = 0; i < n; i++) Formula::template add<L>(rows[i], columns - W, center, end, s, t);
    add_to(firsts + columns - W, s);
    add_to(seconds + columns - W, t);
  } else {
    for (int64_t c = 0; c < left; c++) {
      Value s = 0, t = 0;
      for (int64_t i = 0; i < n; i++)
        Formula::template add<SingleLane<E>>(rows[i], c, origin[c], everything<Value>, s, t);
      firsts[c] += static_cast<double>(s);
      seconds[c] += static_cast<double>(t);
    }
  }
}

// Sums over a few rows are carried in registers, of two vectors of columns at a time: a whole line of the nearest
// cache, on whose address rows that lie apart often agree. Calls body(c, lanes, vectors) for every column, for some
// twice.
template <class E, class Body>
void by_column(int64_t columns, Body&& body) {
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) body(c, VectorLanes<E>{}, Constant<2>{});
  for (; c + W <= columns; c += W) body(c, VectorLanes<E>{}, Constant<1>{});
  if (c < columns && columns >= W)
    body(columns - W, VectorLanes<E>{}, Constant<1>{});
  else
    for (; c < columns; c++) body(c, SingleLane<E>{}, Constant<1>{});
}

template <class Formula, class L, class E, class V, int K>
void sum_columns(const typename Formula::template From<E>* rows, int64_t n, int64_t c, const V (&origin)[K],
                 V (&first)[K], V (&second)[K]) {
  constexpr int64_t LANES = sizeof(V) / sizeof(typename E::Value);
  for (int k = 0; k < K; k++) first[k] = second[k] = V{};
  for (int64_t i = 0; i < n; i++)
    for (int k = 0; k < K; k++)
      Formula::template add<L>(rows[i], c + k * LANES, origin[k], everything<V>, first[k], second[k]);
}

// Sets `firsts` and `seconds` to the formula's sums over a few rows. Where there is no origin it is 0.
template <class Formula, class E>
void sum_few_rows(const typename Formula::template From<E>* rows, int64_t n, int64_t columns,
                  const typename E::Value* origin, double* firsts, double* seconds) {
  by_column<E>(columns, [&](int64_t c, auto lanes, auto vectors) {
    using L = decltype(lanes);
    using V = typename L::V;
    constexpr int64_t LANES = sizeof(V) / sizeof(typename E::Value);
    V center[vectors.value] = {}, s[vectors.value], t[vectors.value];
    for (int k = 0; origin != nullptr && k < vectors.value; k++) center[k] = L::values(origin + c + k * LANES);
    sum_columns<Formula, L, E>(rows, n, c, center, s, t);
    for (int k = 0; k < vectors.value; k++) {
      L::set_doubles(firsts + c + k * LANES, s[k]);
      L::set_doubles(seconds + c + k * LANES, t[k]);
    }
  });
}

// Mean and variance of a few rows, which are read twice, the second time from the nearest cache.
template <class E>
void few_rows_moments(const Arrays<E, 1>* rows, int64_t n, int64_t columns, double* mean, double* variance) {
  typename E::Value inverse = 1 / static_cast<typename E::Value>(n);
  by_column<E>(columns, [&](int64_t c, auto lanes, auto vectors) {
    using L = decltype(lanes);
    using V = typename L::V;
    constexpr int64_t LANES = sizeof(V) / sizeof(typename E::Value);
    V near[vectors.value] = {}, s[vectors.value], q[vectors.value];
    sum_columns<MomentsFormula, L, E>(rows, n, c, near, s, q);
    for (int k = 0; k < vectors.value; k++) near[k] = s[k] * inverse;
    sum_columns<MomentsFormula, L, E>(rows, n, c, near, s, q);
    for (int k = 0; k < vectors.value; k++) {
      V delta = s[k] * inverse, v = q[k] * inverse - delta * delta;
      L::set_sum(mean + c + k * LANES, near[k], delta);
      L::set_doubles(variance + c + k * LANES, v < 0 ? V{} : v);
    }
  });
}

// Stores what the formula makes of each value, with coefficients by column, as map_runs.
template <class Formula, class E>
[[gnu::noinline]] void map_rows(const typename Formula::template From<E>* rows, int64_t n, int64_t columns, bool past,
                                typename E::Value* const (&coefficients)[Formula::COEFFICIENTS]) {
  constexpr int K = Formula::COEFFICIENTS;
  using V = typename E::Vector;
  const typename E::Value* all[K];
  for (int k = 0; k < K; k++) all[k] = coefficients[k];
  if (columns < W) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < columns; c++) {
        typename E::Value by[K];
        for (int k = 0; k < K; k++) by[k] = all[k][c];
        E::store_single(rows[i].out + c, Formula::template map<SingleLane<E>>(rows[i], c, by));
      }
    return;
  }
  struct Coefficients {
    V values[K];
  };
  auto at_column = [&](int64_t c) {
    Coefficients by;
    for (int k = 0; k < K; k++) by.values[k] = VectorLanes<E>::values(all[k] + c);
    return by;
  };
  bool left = columns % W > 0;
  abreast<2>(n, [&](int64_t i, auto count) {
    typename Formula::template From<E> at[count.value];
    V last[count.value] = {};
    bool lines = past && columns % PER_LINE<E> == 0;
    for (int64_t k = 0; k < count.value; k++) {
      at[k] = rows[i + k];
      lines = lines && begins_line(at[k].out);
      if (left) {  // before what it overlaps is written
        Coefficients by = at_column(columns - W);
        last[k] = Formula::template map<VectorLanes<E>>(at[k], columns - W, by.values);
      }
    }
    auto write = [&](auto to, auto vectors) {
#pragma GCC unroll 2
      for (int64_t c = 0; c + vectors.value * W <= columns; c += vectors.value * W) {
        V v[count.value][vectors.value];
        for (int64_t j = 0; j < vectors.value; j++) {
          Coefficients by = at_column(c + j * W);
          for (int64_t k = 0; k < count.value; k++)
            v[k][j] = Formula::template map<VectorLanes<E>>(at[k], c + j * W, by.values);
        }
        for (int64_t k = 0; k < count.value; k++)
          for (int64_t j = 0; j < vectors.value; j++) to.store(at[k].out + c + j * W, v[k][j]);
      }
    };
    if (lines)  // a line at once, for parts of several in turn take twice as long
      write(PastCaches<E>{}, Constant<most<int64_t>(1, PER_LINE<E> / W)>{});
    else
      write(ToCaches<E>{}, Constant<1>{});
    for (int64_t k = 0; left && k < count.value; k++) E::store(at[k].out + columns - W, last[k]);
  });
}

}  // namespace
}  // namespace batchnorm
