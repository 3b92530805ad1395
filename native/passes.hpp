// The loops over data, for one instruction set: included by isa.cpp, which is compiled once for each. Nothing here may
// use an inline function of the standard library, for a linker keeps one of several copies, whatever it was compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#include "normalize.hpp"

#ifndef BATCHNORM_VECTOR_BYTES
#error "isa.cpp says how wide a vector is"
#endif

namespace batchnorm {
namespace {

template <class T>
T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T most(T a, T b) {
  return b > a ? b : a;
}

// Vectors of GCC and Clang: operators work by element, and wider ones than the processor has are split.
constexpr int W = BATCHNORM_VECTOR_BYTES / 4;  // floats in a vector
typedef float Floats __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(2 * BATCHNORM_VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BATCHNORM_VECTOR_BYTES / 2)));

// Arrays need not be aligned, not even to their elements.
template <class V, class P>
V load_bits(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
void store_bits(P* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class V, class U>
V same_bits(U u) {
  static_assert(sizeof(V) == sizeof(U), "");
  V v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}
Words choose(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// How a stored type is loaded and stored: Value is what arithmetic is in, Vector holds W of them.
struct Float32 {
  using Stored = float;
  using Value = float;
  using Vector = Floats;
  static Vector load(const Stored* p) { return load_bits<Vector>(p); }
  static void store(Stored* p, Vector v) { store_bits(p, v); }
  static Value one(const Stored* p) { return load_bits<Value>(p); }
  static void put(Stored* p, Value v) { store_bits(p, v); }
};

struct Float64 {
  using Stored = double;
  using Value = double;
  using Vector = Doubles;
  static Vector load(const Stored* p) { return load_bits<Vector>(p); }
  static void store(Stored* p, Vector v) { store_bits(p, v); }
  static Value one(const Stored* p) { return load_bits<Value>(p); }
  static void put(Stored* p, Value v) { store_bits(p, v); }
};

// A 16-bit type by its two conversions of whole vectors; single values go through the first element of one.
template <class Conversion>
struct Half {
  using Stored = uint16_t;
  using Value = float;
  using Vector = Floats;
  static Vector load(const Stored* p) {
    return Conversion::widen(__builtin_convertvector(load_bits<Halves>(p), Words));
  }
  static void store(Stored* p, Vector v) {
    store_bits(p, __builtin_convertvector(Conversion::narrow(same_bits<Words>(v)), Halves));
  }
  static Value one(const Stored* p) { return Conversion::widen(Words{} + load_bits<Stored>(p))[0]; }
  static void put(Stored* p, Value v) {
    // Subtracting zero, not adding it, keeps the sign of −0.
    store_bits(p, static_cast<Stored>(Conversion::narrow(same_bits<Words>(v - Floats{}))[0]));
  }
};

struct BFloat16Conversion {
  static Floats widen(Words h) { return same_bits<Floats>(h << 16); }
  static Words narrow(Words u) {  // to nearest, ties to even; NaN stays one
    Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    Words nan = same_bits<Words>((u & 0x7fffffff) > 0x7f800000);
    return choose(nan, (u >> 16) | 0x40, rounded) & 0xffff;
  }
};

struct Float16Conversion {
  static Floats widen(Words h) {
    Words magnitude = h & 0x7fff, sign = (h & 0x8000) << 16;
    // Subnormal numbers are multiples of 2^-24. No subnormal float is used on the way, for frameworks have processors
    // take those for 0.
    Words normal = (magnitude << 13) + 0x38000000;
    Words small = same_bits<Words>(__builtin_convertvector(same_bits<Integers>(magnitude), Floats) * 0x1p-24f);
    Words finite = choose(same_bits<Words>(magnitude < 0x400), small, normal);
    Words special = (magnitude << 13) | 0x7f800000;
    return same_bits<Floats>(choose(same_bits<Words>(magnitude >= 0x7c00), special, finite) | sign);
  }
  static Words narrow(Words u) {  // to nearest, ties to even; NaN stays one, what is too large becomes infinite
    Words magnitude = u & 0x7fffffff, sign = (u & 0x80000000) >> 16;
    Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 lets the processor round a subnormal number at the right bit.
    Words small = same_bits<Words>(same_bits<Floats>(magnitude) + 0.5f) - 0x3f000000;
    Words large = choose(same_bits<Words>(magnitude > 0x7f800000), Words{} + 0x7e00, Words{} + 0x7c00);
    Words result = choose(same_bits<Words>(magnitude < 0x38800000), small, normal);
    return choose(same_bits<Words>(magnitude >= 0x47800000), large, result) | sign;
  }
};

using BFloat16 = Half<BFloat16Conversion>;
using Float16 = Half<Float16Conversion>;

// ---- Runs: n values of one feature side by side. Sums of up to BLOCK values are carried in Value by many partial
// sums, and those in double.

constexpr int64_t BLOCK = 4096;
constexpr int WAYS = 4;

template <class V>
double total(V v) {
  double sum = 0;
  for (int i = 0; i < W; i++) sum += v[i];
  return sum;
}

template <class S>
double sum_run(const typename S::Stored* x, int64_t n) {
  using V = typename S::Vector;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    int64_t end = least(n, begin + BLOCK), i = begin;
    V s[WAYS] = {};
    for (; i + WAYS * W <= end; i += WAYS * W)
      for (int k = 0; k < WAYS; k++) s[k] += S::load(x + i + k * W);
    for (; i + W <= end; i += W) s[0] += S::load(x + i);
    sum += total<V>((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < end; i++) sum += S::one(x + i);
  }
  return sum;
}

// Adds sums of x - origin and of its square.
template <class S>
void moments_run(const typename S::Stored* x, int64_t n, typename S::Value origin, double* sum, double* squares) {
  using V = typename S::Vector;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    int64_t end = least(n, begin + BLOCK), i = begin;
    V s[WAYS] = {}, q[WAYS] = {};
    for (; i + WAYS * W <= end; i += WAYS * W)
      for (int k = 0; k < WAYS; k++) {
        V v = S::load(x + i + k * W) - origin;
        s[k] += v;
        q[k] += v * v;
      }
    for (; i + W <= end; i += W) {
      V v = S::load(x + i) - origin;
      s[0] += v;
      q[0] += v * v;
    }
    *sum += total<V>((s[0] + s[1]) + (s[2] + s[3]));
    *squares += total<V>((q[0] + q[1]) + (q[2] + q[3]));
    for (; i < end; i++) {
      double v = S::one(x + i) - origin;
      *sum += v;
      *squares += v * v;
    }
  }
}

template <class S>
void scale_run(const typename S::Stored* x, typename S::Stored* y, int64_t n, typename S::Value origin,
               typename S::Value scale, typename S::Value shift) {
  int64_t i = 0;
  for (; i + W <= n; i += W) S::store(y + i, (S::load(x + i) - origin) * scale + shift);
  for (; i < n; i++) S::put(y + i, (S::one(x + i) - origin) * scale + shift);
}

// Adds sums of dy and of dy·(x - origin).
template <class S>
void gradient_sums_run(const typename S::Stored* x, const typename S::Stored* dy, int64_t n, typename S::Value origin,
                       double* sum, double* centered) {
  using V = typename S::Vector;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    int64_t end = least(n, begin + BLOCK), i = begin;
    V s[WAYS] = {}, t[WAYS] = {};
    for (; i + WAYS * W <= end; i += WAYS * W)
      for (int k = 0; k < WAYS; k++) {
        V g = S::load(dy + i + k * W);
        s[k] += g;
        t[k] += g * (S::load(x + i + k * W) - origin);
      }
    for (; i + W <= end; i += W) {
      V g = S::load(dy + i);
      s[0] += g;
      t[0] += g * (S::load(x + i) - origin);
    }
    *sum += total<V>((s[0] + s[1]) + (s[2] + s[3]));
    *centered += total<V>((t[0] + t[1]) + (t[2] + t[3]));
    for (; i < end; i++) {
      double g = S::one(dy + i);
      *sum += g;
      *centered += g * (S::one(x + i) - origin);
    }
  }
}

template <class S>
void combine_run(const typename S::Stored* x, const typename S::Stored* dy, typename S::Stored* dx, int64_t n,
                 typename S::Value origin, typename S::Value dy_weight, typename S::Value x_weight,
                 typename S::Value constant) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    S::store(dx + i, S::load(dy + i) * dy_weight + ((S::load(x + i) - origin) * x_weight + constant));
  for (; i < n; i++) S::put(dx + i, S::one(dy + i) * dy_weight + ((S::one(x + i) - origin) * x_weight + constant));
}

// ---- Rows: one value of every feature side by side. `rows` points to the rows, at most ROWS of them, so that they may
// lie apart; sums over them are carried in Value, and added to doubles.

constexpr int64_t ROWS = 64;

template <class V>
void add_to(double* sums, V v) {
  for (int i = 0; i < W; i++) sums[i] += v[i];
}

template <class S>
void sum_rows(const typename S::Stored* const* rows, int64_t n, int64_t features, double* sums) {
  using V = typename S::Vector;
  int64_t c = 0;
  for (; c + WAYS * W <= features; c += WAYS * W) {
    V s[WAYS] = {};
    for (int64_t i = 0; i < n; i++)
      for (int k = 0; k < WAYS; k++) s[k] += S::load(rows[i] + c + k * W);
    for (int k = 0; k < WAYS; k++) add_to<V>(sums + c + k * W, s[k]);
  }
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

// How rows are read for sums. From the cache: several abreast, which spares most of the loads and stores of the sums.
// From memory: one after another, each asked for well before it is needed; that alone keeps memory busy.
constexpr int64_t ABREAST = 8;
constexpr int64_t AHEAD = 16 * 1024;  // bytes
struct FromCache {
  static constexpr int64_t ROWS_AT_ONCE = ABREAST;
  static void ahead(const void*) {}
};
struct FromMemory {
  static constexpr int64_t ROWS_AT_ONCE = 1;
  static void ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + AHEAD); }
};

// Adds to sums and seconds, by column, what `terms(i, c, &first, &second)` gives for vector c of row i; `one` does so
// for a single column.
template <class S, class Source, class Terms, class One>
void sum_rows_by(int64_t n, int64_t features, double* sums, double* seconds, Terms&& terms, One&& one) {
  using V = typename S::Vector;
  using Value = typename S::Value;
  constexpr int64_t AT_ONCE = Source::ROWS_AT_ONCE;
  Value first[TILE], second[TILE];
  int64_t vectors = features / W * W;
  for (int64_t tile = 0; tile < vectors; tile += TILE) {
    int64_t width = least(TILE, vectors - tile);
    for (int64_t i = 0; i < n; i += AT_ONCE) {
      int64_t rows = least(AT_ONCE, n - i);
      for (int64_t c = 0; c < width; c += W) {
        V s = {}, t = {};
        if (i > 0) {
          s = load_bits<V>(first + c);
          t = load_bits<V>(second + c);
        }
        if (rows == AT_ONCE) {
#pragma GCC unroll 8
          for (int64_t k = 0; k < AT_ONCE; k++) terms(i + k, tile + c, s, t);
        } else {
          for (int64_t k = 0; k < rows; k++) terms(i + k, tile + c, s, t);
        }
        store_bits(first + c, s);
        store_bits(second + c, t);
      }
    }
    for (int64_t c = 0; c < width; c++) {
      sums[tile + c] += first[c];
      seconds[tile + c] += second[c];
    }
  }
  for (int64_t c = vectors; c < features; c++)
    for (int64_t i = 0; i < n; i++) one(i, c, sums[c], seconds[c]);
}

template <class S, class Source>
void moments_rows(const typename S::Stored* const* rows, int64_t n, int64_t features,
                  const typename S::Value* origin, double* sums, double* squares) {
  using V = typename S::Vector;
  sum_rows_by<S, Source>(
      n, features, sums, squares,
      [&](int64_t i, int64_t c, V& s, V& q) {
        Source::ahead(rows[i] + c);
        V v = S::load(rows[i] + c) - load_bits<V>(origin + c);
        s += v;
        q += v * v;
      },
      [&](int64_t i, int64_t c, double& s, double& q) {
        double v = S::one(rows[i] + c) - origin[c];
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

template <class S>
void scale_rows(const typename S::Stored* const* rows, typename S::Stored* const* out, int64_t n, int64_t features,
                const typename S::Value* origin, const typename S::Value* scale, const typename S::Value* shift) {
  using V = typename S::Vector;
  for (int64_t i = 0; i < n; i++) {
    const typename S::Stored* x = rows[i];
    typename S::Stored* y = out[i];
    int64_t c = 0;
    for (; c + W <= features; c += W)
      S::store(y + c, (S::load(x + c) - load_bits<V>(origin + c)) * load_bits<V>(scale + c) + load_bits<V>(shift + c));
    for (; c < features; c++) S::put(y + c, (S::one(x + c) - origin[c]) * scale[c] + shift[c]);
  }
}

template <class S, class Source>
void gradient_sums_rows(const typename S::Stored* const* rows, const typename S::Stored* const* dys, int64_t n,
                        int64_t features, const typename S::Value* origin, double* sums, double* centered) {
  using V = typename S::Vector;
  sum_rows_by<S, Source>(
      n, features, sums, centered,
      [&](int64_t i, int64_t c, V& s, V& t) {
        Source::ahead(dys[i] + c);
        Source::ahead(rows[i] + c);
        V g = S::load(dys[i] + c);
        s += g;
        t += g * (S::load(rows[i] + c) - load_bits<V>(origin + c));
      },
      [&](int64_t i, int64_t c, double& s, double& t) {
        double g = S::one(dys[i] + c);
        s += g;
        t += g * (S::one(rows[i] + c) - origin[c]);
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
                  typename S::Stored* const* out, int64_t n, int64_t features, const typename S::Value* origin,
                  const typename S::Value* dy_weight, const typename S::Value* x_weight,
                  const typename S::Value* constant) {
  using V = typename S::Vector;
  for (int64_t i = 0; i < n; i++) {
    const typename S::Stored *x = rows[i], *dy = dys[i];
    typename S::Stored* dx = out[i];
    int64_t c = 0;
    for (; c + W <= features; c += W)
      S::store(dx + c, S::load(dy + c) * load_bits<V>(dy_weight + c) +
                           ((S::load(x + c) - load_bits<V>(origin + c)) * load_bits<V>(x_weight + c) +
                            load_bits<V>(constant + c)));
    for (; c < features; c++)
      S::put(dx + c, S::one(dy + c) * dy_weight[c] + ((S::one(x + c) - origin[c]) * x_weight[c] + constant[c]));
  }
}

}  // namespace
}  // namespace batchnorm
