// The loops over data: over runs of one feature, and over rows of all.
#pragma once

#include "vectors.hpp"

namespace batchnorm {
namespace {

// ---- Runs: n values of one feature side by side. What is left over at the end of a run is taken from a whole vector
// that ends there.

constexpr int64_t BLOCK = 4096;  // values of a feature that sums are carried over in Value, before they go to a double
constexpr int WAYS = 4;

template <class V>
double total(V v) {
  Doubles wide = __builtin_convertvector(v, Doubles);
  double parts[W];
  store_bits(parts, wide);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// Keep the last r elements, and make the others 0, whatever they are.
template <class Mask, class V>
V keep_last(V v, int64_t r) {
  Mask lanes;
  for (int i = 0; i < W; i++) lanes[i] = i;
  return same_bits<V>(same_bits<Mask>(v) & (lanes >= W - static_cast<int>(r)));
}
Floats last_of(Floats v, int64_t r) { return keep_last<Integers>(v, r); }
Doubles last_of(Doubles v, int64_t r) { return keep_last<Longs>(v, r); }

// Adds to the elements of two sums what `terms(i, whole, first, second)` gives for the vector at i, where `whole` is to
// be applied to whatever enters a sum; `one` does so for a single value.
template <class S, class Terms, class One>
void sum_run(int64_t n, typename S::Vector& first, typename S::Vector& second, Terms&& terms, One&& one) {
  using V = typename S::Vector;
  if (n < W) {
    typename S::Value s = 0, t = 0;
    for (int64_t i = 0; i < n; i++) one(i, s, t);
    first[0] += s;
    second[0] += t;
    return;
  }
  auto whole = [](V v) { return v; };
  V sum = first, other = second;
  int64_t i = 0;
  if (n >= WAYS * W) {
    V s[WAYS] = {}, t[WAYS] = {};
    for (; i + WAYS * W <= n; i += WAYS * W)
      for (int k = 0; k < WAYS; k++) terms(i + k * W, whole, s[k], t[k]);
    sum += (s[0] + s[1]) + (s[2] + s[3]);
    other += (t[0] + t[1]) + (t[2] + t[3]);
  }
  for (; i + W <= n; i += W) terms(i, whole, sum, other);
  if (i < n) terms(n - W, [&](V v) { return last_of(v, n - i); }, sum, other);
  first = sum;
  second = other;
}

// Sums of x - origin and of its square.
template <class S>
void moments_run(const typename S::Stored* x, int64_t n, typename S::Value origin, typename S::Vector& sum,
                 typename S::Vector& squares) {
  using V = typename S::Vector;
  using Value = typename S::Value;
  sum_run<S>(
      n, sum, squares,
      [&](int64_t i, auto&& whole, V& s, V& q) {
        V v = whole(S::load(x + i) - origin);
        s += v;
        q += v * v;
      },
      [&](int64_t i, Value& s, Value& q) {
        Value v = S::one(x + i) - origin;
        s += v;
        q += v * v;
      });
}

// Sums of dy and of dy·(x - origin).
template <class S>
void gradient_sums_run(const typename S::Stored* x, const typename S::Stored* dy, int64_t n, typename S::Value origin,
                       typename S::Vector& sum, typename S::Vector& centered) {
  using V = typename S::Vector;
  using Value = typename S::Value;
  sum_run<S>(
      n, sum, centered,
      [&](int64_t i, auto&& whole, V& s, V& t) {
        V g = whole(S::load(dy + i));
        s += g;
        t += g * whole(S::load(x + i) - origin);
      },
      [&](int64_t i, Value& s, Value& t) {
        Value g = S::one(dy + i);
        s += g;
        t += g * (S::one(x + i) - origin);
      });
}

// How a result is written that is `past` the caches, or not.
template <class S>
struct ToCache {
  static void store(typename S::Stored* p, typename S::Vector v) { S::store(p, v); }
};
template <class S>
struct PastCaches {
  static void store(typename S::Stored* p, typename S::Vector v) { S::stream(p, v); }
};
// Only whole lines of the caches are worth it.
constexpr int64_t LINE = 64;
bool begins_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % LINE == 0; }

// Stores map(i), of the vector at i, or one(i), of a single value. What they read at i may lie where it is stored.
template <class S, class Map, class One>
void map_run(typename S::Stored* y, int64_t n, bool past, Map&& map, One&& one) {
  using V = typename S::Vector;
  constexpr int64_t PER_LINE = LINE / sizeof(*y), UNIT = PER_LINE < W ? W : PER_LINE;
  if (n < W) {
    for (int64_t i = 0; i < n; i++) S::put(y + i, one(i));
    return;
  }
  auto write = [&](int64_t i, int64_t end, auto to) {
    for (; i + WAYS * W <= end; i += WAYS * W) {
      V v[WAYS];
      for (int k = 0; k < WAYS; k++) v[k] = map(i + k * W);
      for (int k = 0; k < WAYS; k++) to.store(y + i + k * W, v[k]);
    }
    for (; i + W <= end; i += W) to.store(y + i, map(i));
  };
  V last = map(n - W);  // before what it overlaps is written
  int64_t first = 0, lines = 0;
  if (past && n >= 4 * WAYS * W) {
    while (first < PER_LINE && !begins_line(y + first)) first++;
    if (first < PER_LINE) lines = (n - first - UNIT) / UNIT * UNIT;
  }
  if (lines == 0) {
    write(0, n, ToCache<S>{});
  } else {
    if (first > 0) {
      if (first < W) first += UNIT, lines -= UNIT;
      V before = map(first - W);
      write(0, first, ToCache<S>{});
      S::store(y + first - W, before);
    }
    write(first, first + lines, PastCaches<S>{});
    write(first + lines, n, ToCache<S>{});
  }
  S::store(y + n - W, last);
}

template <class S>
void scale_run(const typename S::Stored* x, typename S::Stored* y, int64_t n, bool past, typename S::Value origin,
               typename S::Value scale, typename S::Value shift) {
  map_run<S>(
      y, n, past, [&](int64_t i) { return (S::load(x + i) - origin) * scale + shift; },
      [&](int64_t i) { return (S::one(x + i) - origin) * scale + shift; });
}

template <class S>
void combine_run(const typename S::Stored* x, const typename S::Stored* dy, typename S::Stored* dx, int64_t n,
                 bool past, typename S::Value origin, typename S::Value dy_weight, typename S::Value x_weight,
                 typename S::Value constant) {
  map_run<S>(
      dx, n, past,
      [&](int64_t i) { return S::load(dy + i) * dy_weight + ((S::load(x + i) - origin) * x_weight + constant); },
      [&](int64_t i) { return S::one(dy + i) * dy_weight + ((S::one(x + i) - origin) * x_weight + constant); });
}

// ---- Rows: one value of every feature side by side. `rows` points to the rows, at most ROWS of them, so that they may
// lie apart; sums over them are carried in Value, and added to doubles.

constexpr int64_t ROWS = 64;

// Rows that are worked on abreast, which spares loads and stores of sums and coefficients.
constexpr int64_t ABREAST = 2;

// Calls body(i, n) for n rows from i on, with n = ABREAST known when this is compiled as often as that goes.
template <class Body>
void abreast(int64_t rows, Body&& body) {
  int64_t i = 0;
  for (; i + ABREAST <= rows; i += ABREAST) body(i, Constant<ABREAST>{});
  for (; i < rows; i++) body(i, Constant<1>{});
}

template <class V>
void add_to(double* sums, V v) {
  store_bits(sums, load_bits<Doubles>(sums) + __builtin_convertvector(v, Doubles));
}

template <class S>
void sum_rows(const typename S::Stored* const* rows, int64_t n, int64_t features, double* sums) {
  using V = typename S::Vector;
  int64_t c = 0;
  for (; c + W <= features; c += W) {
    V s = {};
    for (int64_t i = 0; i < n; i++) s += S::load(rows[i] + c);
    add_to<V>(sums + c, s);
  }
  for (; c < features; c++)
    for (int64_t i = 0; i < n; i++) sums[c] += S::one(rows[i] + c);
}

// Columns that sums are carried for at a time.
constexpr int64_t TILE = 1024;

// A row of each of N arrays; copied, since a compiler must take a store for one to the pointers, too.
template <class S, int N>
struct Row {
  const typename S::Stored* of[N];
};
template <class S, int N>
Row<S, N> row(const typename S::Stored* const* const (&arrays)[N], int64_t i) {
  Row<S, N> found;
  for (int a = 0; a < N; a++) found.of[a] = arrays[a][i];
  return found;
}

// Adds to sums and seconds, by column, what `terms(row, c, whole, first, second)` gives for the vector at column c of
// each row, and `one` for a single column; as in sum_run.
template <class S, int N, class Terms, class One>
void sum_rows_by(const typename S::Stored* const* const (&arrays)[N], int64_t n, int64_t features, double* sums,
                 double* seconds, Terms&& terms, One&& one) {
  using V = typename S::Vector;
  using Value = typename S::Value;
  alignas(sizeof(V)) Value first[TILE], second[TILE];
  int64_t vectors = features / W * W, left = features - vectors;
  auto whole = [](V v) { return v; };
  for (int64_t tile = 0; tile < vectors; tile += TILE) {
    int64_t width = least(TILE, vectors - tile);
    for (int64_t c = 0; c < width; c++) first[c] = second[c] = 0;
    abreast(n, [&](int64_t i, auto rows) {
      Row<S, N> at[rows.value];
      for (int64_t k = 0; k < rows.value; k++) at[k] = row<S, N>(arrays, i + k);
      for (int64_t c = 0; c < width; c += W) {
        V s = load_bits<V>(first + c), t = load_bits<V>(second + c);
#pragma GCC unroll 4
        for (int64_t k = 0; k < rows.value; k++) terms(at[k], tile + c, whole, s, t);
        store_bits(first + c, s);
        store_bits(second + c, t);
      }
    });
    for (int64_t c = 0; c < width; c += W) {
      add_to<V>(sums + tile + c, load_bits<V>(first + c));
      add_to<V>(seconds + tile + c, load_bits<V>(second + c));
    }
  }
  if (left > 0 && vectors > 0) {
    V s = {}, t = {};
    auto end = [&](V v) { return last_of(v, left); };
    for (int64_t i = 0; i < n; i++) terms(row<S, N>(arrays, i), features - W, end, s, t);
    add_to<V>(sums + features - W, s);
    add_to<V>(seconds + features - W, t);
  } else {
    for (int64_t c = 0; c < left; c++)
      for (int64_t i = 0; i < n; i++) one(row<S, N>(arrays, i), c, sums[c], seconds[c]);
  }
}

template <class S>
void moments_rows(const typename S::Stored* const* rows, int64_t n, int64_t features,
                  const typename S::Value* origin, double* sums, double* squares) {
  using V = typename S::Vector;
  sum_rows_by<S, 1>(
      {rows}, n, features, sums, squares,
      [&](const Row<S, 1>& x, int64_t c, auto&& whole, V& s, V& q) {
        V v = whole(S::load(x.of[0] + c) - load_bits<V>(origin + c));
        s += v;
        q += v * v;
      },
      [&](const Row<S, 1>& x, int64_t c, double& s, double& q) {
        double v = S::one(x.of[0] + c) - origin[c];
        s += v;
        q += v * v;
      });
}

// Mean and variance of a few rows in K vectors of columns from c on, which are read twice, the second time from the
// nearest cache. Two vectors are a whole line of it, on whose address rows that lie apart often agree.
template <class S, int K>
void moments_few(const typename S::Stored* const* rows, int64_t n, int64_t c, typename S::Value* mean,
                 typename S::Value* variance) {
  using V = typename S::Vector;
  typename S::Value inverse = 1 / static_cast<typename S::Value>(n);
  V m[K] = {}, s[K] = {}, q[K] = {};
  for (int64_t i = 0; i < n; i++)
    for (int k = 0; k < K; k++) m[k] += S::load(rows[i] + c + k * W);
  for (int k = 0; k < K; k++) m[k] *= inverse;
  for (int64_t i = 0; i < n; i++)
    for (int k = 0; k < K; k++) {
      V v = S::load(rows[i] + c + k * W) - m[k];
      s[k] += v;
      q[k] += v * v;
    }
  for (int k = 0; k < K; k++) {
    V delta = s[k] * inverse, v = q[k] * inverse - delta * delta;
    store_bits(mean + c + k * W, m[k] + delta);
    store_bits(variance + c + k * W, v < 0 ? V{} : v);
  }
}

// Of all columns.
template <class S>
void moments_few_rows(const typename S::Stored* const* rows, int64_t n, int64_t features, typename S::Value* mean,
                      typename S::Value* variance) {
  int64_t c = 0;
  for (; c + 2 * W <= features; c += 2 * W) moments_few<S, 2>(rows, n, c, mean, variance);
  for (; c + W <= features; c += W) moments_few<S, 1>(rows, n, c, mean, variance);
  for (; c < features; c++) {
    double m = 0, q = 0, count = static_cast<double>(n);
    for (int64_t i = 0; i < n; i++) m += S::one(rows[i] + c);
    m /= count;
    for (int64_t i = 0; i < n; i++) q += (S::one(rows[i] + c) - m) * (S::one(rows[i] + c) - m);
    mean[c] = static_cast<typename S::Value>(m);
    variance[c] = static_cast<typename S::Value>(q / count);
  }
}

// Stores map(row, c, coefficients) of the vector at column c of each row, or one(row, c) of a single value; as in
// map_run. `coefficients(c)` are those of a vector of columns.
template <class S, int N, class Coefficients, class Map, class One>
void map_rows(const typename S::Stored* const* const (&arrays)[N], typename S::Stored* const* out, int64_t n,
              int64_t features, bool past, Coefficients&& coefficients, Map&& map, One&& one) {
  using V = typename S::Vector;
  if (features < W) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < features; c++) S::put(out[i] + c, one(row<S, N>(arrays, i), c));
    return;
  }
  bool left = features % W > 0;
  abreast(n, [&](int64_t i, auto rows) {
    Row<S, N> at[rows.value];
    typename S::Stored* to[rows.value];
    V last[rows.value] = {};
    for (int64_t k = 0; k < rows.value; k++) {
      at[k] = row<S, N>(arrays, i + k);
      to[k] = out[i + k];
      if (left) last[k] = map(at[k], features - W, coefficients(features - W));  // before what it overlaps is written
    }
    auto all = [&](auto how) {
#pragma GCC unroll 2
      for (int64_t c = 0; c + W <= features; c += W) {
        auto by = coefficients(c);
        V v[rows.value];
        for (int64_t k = 0; k < rows.value; k++) v[k] = map(at[k], c, by);
        for (int64_t k = 0; k < rows.value; k++) how.store(to[k] + c, v[k]);
      }
    };
    bool lines = past && features * static_cast<int64_t>(sizeof(*to[0])) % LINE == 0;
    for (int64_t k = 0; k < rows.value; k++) lines = lines && begins_line(to[k]);
    if (lines)
      all(PastCaches<S>{});
    else
      all(ToCache<S>{});
    for (int64_t k = 0; left && k < rows.value; k++) S::store(to[k] + features - W, last[k]);
  });
}

template <class S>
void scale_rows(const typename S::Stored* const* rows, typename S::Stored* const* out, int64_t n, int64_t features,
                bool past, const typename S::Value* origin, const typename S::Value* scale, const typename S::Value* shift) {
  using V = typename S::Vector;
  struct By {
    V origin, scale, shift;
  };
  map_rows<S, 1>(
      {rows}, out, n, features, past,
      [&](int64_t c) { return By{load_bits<V>(origin + c), load_bits<V>(scale + c), load_bits<V>(shift + c)}; },
      [&](const Row<S, 1>& x, int64_t c, const By& by) {
        return (S::load(x.of[0] + c) - by.origin) * by.scale + by.shift;
      },
      [&](const Row<S, 1>& x, int64_t c) { return (S::one(x.of[0] + c) - origin[c]) * scale[c] + shift[c]; });
}

template <class S>
void gradient_sums_rows(const typename S::Stored* const* rows, const typename S::Stored* const* dys, int64_t n,
                        int64_t features, const typename S::Value* origin, double* sums, double* centered) {
  using V = typename S::Vector;
  sum_rows_by<S, 2>(
      {rows, dys}, n, features, sums, centered,
      [&](const Row<S, 2>& both, int64_t c, auto&& whole, V& s, V& t) {
        V g = whole(S::load(both.of[1] + c));
        s += g;
        t += g * whole(S::load(both.of[0] + c) - load_bits<V>(origin + c));
      },
      [&](const Row<S, 2>& both, int64_t c, double& s, double& t) {
        double g = S::one(both.of[1] + c);
        s += g;
        t += g * (S::one(both.of[0] + c) - origin[c]);
      });
}

// Sums over a few rows, by column as above; sums are set, not added to.
template <class S, int K>
void gradient_sums_few(const typename S::Stored* const* rows, const typename S::Stored* const* dys, int64_t n,
                       int64_t c, const typename S::Value* origin, double* sums, double* centered) {
  using V = typename S::Vector;
  V s[K] = {}, t[K] = {};
  for (int64_t i = 0; i < n; i++)
    for (int k = 0; k < K; k++) {
      V g = S::load(dys[i] + c + k * W);
      s[k] += g;
      t[k] += g * (S::load(rows[i] + c + k * W) - load_bits<V>(origin + c + k * W));
    }
  for (int k = 0; k < K; k++) {
    store_bits(sums + c + k * W, __builtin_convertvector(s[k], Doubles));
    store_bits(centered + c + k * W, __builtin_convertvector(t[k], Doubles));
  }
}

template <class S>
void gradient_sums_few_rows(const typename S::Stored* const* rows, const typename S::Stored* const* dys, int64_t n,
                            int64_t features, const typename S::Value* origin, double* sums, double* centered) {
  int64_t c = 0;
  for (; c + 2 * W <= features; c += 2 * W) gradient_sums_few<S, 2>(rows, dys, n, c, origin, sums, centered);
  for (; c + W <= features; c += W) gradient_sums_few<S, 1>(rows, dys, n, c, origin, sums, centered);
  for (; c < features; c++) {
    sums[c] = centered[c] = 0;
    for (int64_t i = 0; i < n; i++) {
      double g = S::one(dys[i] + c);
      sums[c] += g;
      centered[c] += g * (S::one(rows[i] + c) - origin[c]);
    }
  }
}

template <class S>
void combine_rows(const typename S::Stored* const* rows, const typename S::Stored* const* dys,
                  typename S::Stored* const* out, int64_t n, int64_t features, bool past,
                  const typename S::Value* origin, const typename S::Value* dy_weight, const typename S::Value* x_weight,
                  const typename S::Value* constant) {
  using V = typename S::Vector;
  struct By {
    V origin, dy_weight, x_weight, constant;
  };
  map_rows<S, 2>(
      {rows, dys}, out, n, features, past,
      [&](int64_t c) {
        return By{load_bits<V>(origin + c), load_bits<V>(dy_weight + c), load_bits<V>(x_weight + c),
                  load_bits<V>(constant + c)};
      },
      [&](const Row<S, 2>& both, int64_t c, const By& by) {
        return S::load(both.of[1] + c) * by.dy_weight +
               ((S::load(both.of[0] + c) - by.origin) * by.x_weight + by.constant);
      },
      [&](const Row<S, 2>& both, int64_t c) {
        return S::one(both.of[1] + c) * dy_weight[c] + ((S::one(both.of[0] + c) - origin[c]) * x_weight[c] + constant[c]);
      });
}

}  // namespace
}  // namespace batchnorm
