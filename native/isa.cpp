// The operations for one instruction set. CMake compiles this file once for each, with BATCHNORM_ISA its name.
#include "memory.hpp"
#include "passes.hpp"
#include "threads.hpp"

namespace batchnorm {
namespace {

constexpr int64_t SERIAL = 1 << 15;       // values below which waking another thread takes longer than the work
constexpr int64_t CACHE = 2 << 20;         // bytes of a block of features that should stay in a cache
constexpr int64_t STRETCH = 64 * 1024;    // bytes that should be read side by side
constexpr int64_t WIDE = 512;             // features up to which rows are joined
constexpr int64_t NARROW_STRETCH = 8192;  // the same where runs are shorter than a vector
constexpr int64_t BURST = 1024;           // bytes of one place that are read before it is the next one's turn
constexpr int64_t PLACES = 4;             // places that are read in turn
constexpr int64_t FIRST = 8;              // rows whose mean the others are measured from

template <class F>
void run_tasks(int64_t tasks, bool serial, F&& task) {
  if (serial)
    for (int64_t i = 0; i < tasks; i++) task(i);
  else
    parallel(tasks, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &task);
}

double root(double v) { return __builtin_sqrt(v); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Carve typed arrays out of one piece of scratch memory.
class Carver {
 public:
  Carver(Slot slot, int64_t bytes) : next_(static_cast<char*>(scratch(slot, bytes))), end_(next_ + bytes) {}
  template <class T>
  T* take(int64_t n) {
    char* here = next_;
    next_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
#ifdef BATCHNORM_CHECKED
    if (next_ > end_) __builtin_trap();
#endif
    return reinterpret_cast<T*>(here);
  }

 private:
  char* next_;
  [[maybe_unused]] char* end_;
};

// The row of the whole array that is row i of a group.
int64_t row_of(const View& v, int64_t group, int64_t i) {
  if (v.groups == 1) return i;
  if (v.span == 1) return i * v.groups + group;
  return (i / v.span * v.groups + group) * v.span + i % v.span;
}


// ---- Features in the middle: a block of features at a time, which stays in cache.

template <class S>
class Inner {
 public:
  using Stored = typename S::Stored;
  using Value = typename S::Value;
  using Vector = typename S::Vector;

  // Works on up to `width` features at a time, in scratch memory that it takes.
  Inner(const View& view, Carver& carver, int64_t width) : v(view) {
    if (narrow(v)) {
      for (double*& sums : column_sums) sums = carver.take<double>(width * v.inner);
      for (Value*& by : columns) by = carver.take<Value>(width * v.inner);
    } else {
      partial = carver.take<Vector>(2 * width);
    }
  }
  static int64_t scratch_bytes(const View& v, int64_t width) {
    return narrow(v) ? 6 * (width * v.inner * 8 + 64) : 2 * width * static_cast<int64_t>(sizeof(Vector)) + 64;
  }

  // How many features to work on at a time.
  static int64_t block(const View& v, int64_t arrays, bool all_groups, bool serial) {
    int64_t run = v.inner * static_cast<int64_t>(sizeof(Stored));
    int64_t bytes = (all_groups ? v.rows : v.rows / v.groups) * run * arrays;
    int64_t side = ceil_div(narrow(v) ? NARROW_STRETCH : STRETCH, run);
    int64_t features = most<int64_t>(1, least(side, CACHE / most<int64_t>(bytes, 1)));
    if (serial) return least(features, v.features);
    int64_t share = 2 * num_threads(), tasks = ceil_div(ceil_div(v.features, features), share) * share;
    return ceil_div(v.features, tasks);  // so that every thread has as much to do
  }

  void moments(const Stored* x, int64_t group, int64_t c0, int64_t c1, double* mean, double* variance,
               Value* origin, double* deltas) const {
    int64_t rows = group_rows(), width = c1 - c0;
    if (narrow(v)) {
      add_columns<1>({x}, group, c0, width, least(rows, FIRST), deltas, variance,
                     [&](auto& p, int64_t n, int64_t f, double* s, double*) { sum_rows<S>(p[0], n, f, s); });
      double share = 1 / static_cast<double>(most<int64_t>(least(rows, FIRST) * v.inner, 1));
      for (int64_t c = 0; c < width; c++) origin[c] = static_cast<Value>(deltas[c] * share);
      const Value* by = spread(origin, width, columns[0]);
      add_columns<1>({x}, group, c0, width, rows, deltas, variance,
                     [&](auto& p, int64_t n, int64_t f, double* s, double* q) {
                       moments_rows<S>(p[0], n, f, by, s, q);
                     });
    } else {
      int64_t some = least<int64_t>(v.inner, WAYS * W);
      for (int64_t c = 0; c < width; c++) {
        Vector sum = {}, squares = {};
        if (rows) moments_run<S>(x + offset(group, 0, c0 + c), some, 0, sum, squares);
        origin[c] = static_cast<Value>(total(sum) / static_cast<double>(some));
      }
      add_runs(group, c0, c1, deltas, variance, [&](int64_t at, int64_t n, int64_t c, Vector& sum, Vector& squares) {
        moments_run<S>(x + at, n, origin[c], sum, squares);
      });
    }
    double inverse = rows ? 1 / static_cast<double>(rows * v.inner) : 0;
    for (int64_t c = 0; c < width; c++) {
      double delta = deltas[c] * inverse, square = variance[c] * inverse - delta * delta;
      mean[c] = static_cast<double>(origin[c]) + delta;
      variance[c] = square < 0 ? 0 : square;
    }
  }

  void scale(const Stored* x, Stored* y, int64_t group, int64_t c0, int64_t c1, const Value* origin, const Value* scale,
             const Value* shift) const {
    int64_t width = c1 - c0;
    if (narrow(v)) {
      const Value *o = spread(origin, width, columns[0]), *a = spread(scale, width, columns[1]);
      const Value* b = spread(shift, width, columns[2]);
      by_columns<2>({x, y}, group, c0, width, group_rows(), [&](auto& p, int64_t n, int64_t f) {
        scale_rows<S>(p[0], const_cast<Stored**>(p[1]), n, f, past, o, a, b);
      });
    } else {
      for (int64_t i = group_rows() - 1; i >= 0; i--) {  // backwards: the end is what the cache still has
        int64_t at = offset(group, i, c0);
        for (int64_t c = 0; c < width; c++, at += v.inner)
          scale_run<S>(x + at, y + at, v.inner, past, origin[c], scale[c], shift[c]);
      }
    }
    if (past) fence();
  }

  void sums(const Stored* x, const Stored* dy, int64_t group, int64_t c0, int64_t c1, const Value* origin, double* sum,
            double* centered) const {
    int64_t width = c1 - c0;
    if (narrow(v)) {
      const Value* by = spread(origin, width, columns[0]);
      add_columns<2>({x, dy}, group, c0, width, group_rows(), sum, centered,
                     [&](auto& p, int64_t n, int64_t f, double* s, double* t) {
                       gradient_sums_rows<S>(p[0], p[1], n, f, by, s, t);
                     });
    } else {
      add_runs(group, c0, c1, sum, centered, [&](int64_t at, int64_t n, int64_t c, Vector& first, Vector& second) {
        gradient_sums_run<S>(x + at, dy + at, n, origin[c], first, second);
      });
    }
  }

  void combine(const Stored* x, const Stored* dy, Stored* dx, int64_t group, int64_t c0, int64_t c1,
               const Value* origin, const Value* dy_weight, const Value* x_weight, const Value* constant) const {
    int64_t width = c1 - c0;
    if (narrow(v)) {
      const Value *o = spread(origin, width, columns[0]), *a = spread(dy_weight, width, columns[1]);
      const Value *b = spread(x_weight, width, columns[2]), *c = spread(constant, width, columns[3]);
      by_columns<3>({x, dy, dx}, group, c0, width, group_rows(), [&](auto& p, int64_t n, int64_t f) {
        combine_rows<S>(p[0], p[1], const_cast<Stored**>(p[2]), n, f, past, o, a, b, c);
      });
    } else {
      for (int64_t i = group_rows() - 1; i >= 0; i--) {
        int64_t at = offset(group, i, c0);
        for (int64_t c = 0; c < width; c++, at += v.inner)
          combine_run<S>(x + at, dy + at, dx + at, v.inner, past, origin[c], dy_weight[c], x_weight[c], constant[c]);
      }
    }
    if (past) fence();
  }

 private:
  // Whether a run is shorter than a vector. Then rows are worked on as if every value were a feature.
  static bool narrow(const View& v) { return v.inner < W; }

  int64_t group_rows() const { return v.rows / v.groups; }
  int64_t offset(int64_t group, int64_t i, int64_t c) const {
    return (row_of(v, group, i) * v.features + c) * v.inner;
  }

  // Calls run(i, at, c) for every row i and feature c0 + c before c1 of a group, whose values begin at `at`. Short runs of
  // several rows take turns: while some of one row are worked on, the processor fetches what follows in the others.
  template <class Run>
  void runs(int64_t group, int64_t c0, int64_t c1, Run&& run) const {
    int64_t rows = group_rows(), bytes = v.inner * static_cast<int64_t>(sizeof(Stored));
    int64_t some = bytes < BURST ? ceil_div(BURST, bytes) : c1 - c0;
    for (int64_t begin = 0; begin < rows; begin += PLACES)
      for (int64_t c = c0; c < c1; c += some)
        for (int64_t i = begin; i < least(rows, begin + PLACES); i++) {
          int64_t at = offset(group, i, c);
          for (int64_t k = c; k < least(c1, c + some); k++, at += v.inner) run(i, at, k - c0);
        }
  }

  // Adds up, for each feature in [c0, c1) of a group, what `add(at, n, c, first, second)` gives for the n values from
  // `at` on: in vectors for as long as that is exact enough, then in doubles.
  template <class Add>
  void add_runs(int64_t group, int64_t c0, int64_t c1, double* firsts, double* seconds, Add&& add) const {
    int64_t rows = group_rows(), width = c1 - c0, held = most<int64_t>(1, least(ROWS, BLOCK / v.inner));
    Vector *first = partial, *second = partial + width;
    for (int64_t c = 0; c < width; c++) {
      firsts[c] = seconds[c] = 0;
      first[c] = second[c] = Vector{};
    }
    runs(group, c0, c1, [&](int64_t i, int64_t at, int64_t c) {
      bool full = (i + 1) % held == 0 || i + 1 == rows;
      for (int64_t begin = 0; begin < v.inner; begin += BLOCK) {
        add(at + begin, least(BLOCK, v.inner - begin), c, first[c], second[c]);
        if (!full) continue;
        firsts[c] += total(first[c]);
        seconds[c] += total(second[c]);
        first[c] = second[c] = Vector{};
      }
    });
  }

  // ---- With every value as if it were a feature, a column of its own.

  // Repeats what is by feature for each of its columns.
  const Value* spread(const Value* by, int64_t width, Value* to) const {
    for (int64_t c = 0; c < width; c++)
      for (int64_t k = 0; k < v.inner; k++) to[c * v.inner + k] = by[c];
    return to;
  }

  // Calls body with pointers to up to ROWS of the first `rows` rows at a time.
  template <int ARRAYS, class Body>
  void by_columns(const Stored* const (&arrays)[ARRAYS], int64_t group, int64_t c0, int64_t width, int64_t rows,
                  Body&& body) const {
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
      const Stored* pointers[ARRAYS][ROWS];
      int64_t n = least(ROWS, rows - begin);
      for (int64_t i = 0; i < n; i++)
        for (int a = 0; a < ARRAYS; a++) pointers[a][i] = arrays[a] + offset(group, begin + i, c0);
      body(pointers, n, width * v.inner);
    }
  }

  template <int ARRAYS, class Add>
  void add_columns(const Stored* const (&arrays)[ARRAYS], int64_t group, int64_t c0, int64_t width, int64_t rows,
                   double* firsts, double* seconds, Add&& add) const {
    auto [first, second] = column_sums;
    for (int64_t k = 0; k < width * v.inner; k++) first[k] = second[k] = 0;
    by_columns<ARRAYS>(arrays, group, c0, width, rows,
                       [&](auto& p, int64_t n, int64_t f) { add(p, n, f, first, second); });
    for (int64_t c = 0; c < width; c++) {
      firsts[c] = seconds[c] = 0;
      for (int64_t k = c * v.inner; k < (c + 1) * v.inner; k++) firsts[c] += first[k], seconds[c] += second[k];
    }
  }

  const View& v;
  bool past = exceeds_caches(v.size() * static_cast<int64_t>(sizeof(Stored)));  // so results go past the caches
  Vector* partial = nullptr;
  double* column_sums[2] = {};
  Value* columns[4] = {};
};

// ---- Features last: rows of all features. A few features are seen as a wider row of several rows side by side.

template <class S>
struct Rows {
  using Stored = typename S::Stored;
  using Value = typename S::Value;
  const View& v;
  bool past = exceeds_caches(v.size() * static_cast<int64_t>(sizeof(Stored)));  // so results go past the caches

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
    constexpr int64_t PLACES = ARRAYS < 3 ? 4 : 2, LENGTH = ROWS / PLACES;
    int64_t w = widening(), length = (end - begin) / w / PLACES;
    for (int64_t first = 0; first < length; first += LENGTH) {
      const Stored* pointers[ARRAYS][ROWS];
      int64_t n = 0;
      for (int64_t j = first; j < least(length, first + LENGTH); j++)
        for (int64_t place = 0; place < PLACES; place++, n++) {
          int64_t at = row_of(v, group, begin + (place * length + j) * w) * v.features;
          for (int a = 0; a < ARRAYS; a++) pointers[a][n] = arrays[a] + at;
        }
      body(pointers, n, v.features * w);
    }
    int64_t whole = begin + (end - begin) / w * w;
    block<ARRAYS>(arrays, group, begin + length * PLACES * w, whole, w, body);
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

// ---- The little arithmetic between the passes; it mirrors batchnorm/core/algebra.py.

// Every option in two numbers for each of n parameters from the i-th on: y = (x - m)/sigma·factor + offset. With renorm,
// after `correction`.
void options(const Forward& p, int64_t i, int64_t n, double* factor, double* offset) {
  for (int64_t c = i; c < i + n; c++) {
    double f = p.renorm_mean ? p.r.get(c) : 1, o = p.renorm_mean ? p.d.get(c) : 0;
    if (p.adjustment_scale) {
      f *= p.adjustment_scale.get(c);
      o = o * p.adjustment_scale.get(c) + p.adjustment_bias.get(c);
    }
    if (p.gamma) {
      f *= p.gamma.get(c);
      o *= p.gamma.get(c);
    }
    if (p.beta) o += p.beta.get(c);
    factor[c - i] = f;
    offset[c - i] = o;
  }
}

// y = (x - origin)·scale + shift, of n features.
template <class M, class Value>
void coefficients(int64_t n, double epsilon, const double* factor, const double* offset, const M* mean,
                  const M* variance, Value* __restrict origin, Value* __restrict scale, Value* __restrict shift) {
  for (int64_t c = 0; c < n; c++) {
    double s = factor[c] / root(static_cast<double>(variance[c]) + epsilon);
    Value near = static_cast<Value>(mean[c]);
    scale[c] = static_cast<Value>(s);
    shift[c] = static_cast<Value>(offset[c] + (static_cast<double>(near) - static_cast<double>(mean[c])) * s);
    origin[c] = near;
  }
}

// Renorm's correction of n parameters from the i-th on.
template <class M>
void correction(const Forward& p, int64_t i, int64_t n, const M* mean, const M* variance) {
  for (int64_t c = 0; c < n; c++) {
    double floor = most(p.renorm_stddev.get(i + c), root(p.epsilon));
    double r = root(static_cast<double>(variance[c]) + p.epsilon) / floor;
    double d = (static_cast<double>(mean[c]) - p.renorm_mean.get(i + c)) / floor;
    if (r < p.rmin) r = p.rmin;
    if (r > p.rmax) r = p.rmax;
    if (d < -p.dmax) d = -p.dmax;
    if (d > p.dmax) d = p.dmax;
    p.r.set(i + c, r);
    p.d.set(i + c, d);
  }
}

void options(const Backward& p, int64_t i, int64_t n, double* factor) {
  for (int64_t c = i; c < i + n; c++) {
    double f = p.gamma ? p.gamma.get(c) : 1;
    if (p.r) f *= p.r.get(c);
    if (p.adjustment_scale) f *= p.adjustment_scale.get(c);
    factor[c - i] = f;
  }
}

// dx = dy·dy_weight + (x - origin)·x_weight + constant, of n features with `count` values each. Adds the sums of dy and
// of dy·(x - m)/sigma to `all` and `normalized`.
template <class Value>
void combination(int64_t n, int64_t count, double epsilon, const double* factor, const Value* variance,
                 const double* sum, const double* centered, Value* __restrict dy_weight, Value* __restrict x_weight,
                 Value* __restrict constant, double* __restrict all, double* __restrict normalized) {
  double share = 1 / static_cast<double>(most<int64_t>(count, 1));
  for (int64_t c = 0; c < n; c++) {
    double inverse = 1 / root(static_cast<double>(variance[c]) + epsilon), k = factor[c] * inverse;
    dy_weight[c] = static_cast<Value>(k);
    x_weight[c] = static_cast<Value>(-k * inverse * inverse * (centered[c] * share));
    constant[c] = static_cast<Value>(-k * (sum[c] * share));
    all[c] += sum[c];
    normalized[c] += centered[c] * inverse;
  }
}

// Gradients of n parameters from the i-th on, from the sums of dy and of dy·(x - m)/sigma over all that they serve.
void parameter_gradients(const Backward& p, int64_t i, int64_t n, const double* sums, const double* normalized) {
  for (int64_t c = i; c < i + n; c++) {
    double sum = sums[c - i];
    double corrected = p.r ? p.r.get(c) * normalized[c - i] + p.d.get(c) * sum : normalized[c - i];
    double a = p.adjustment_scale ? p.adjustment_scale.get(c) : 1;
    double b = p.adjustment_scale ? p.adjustment_bias.get(c) : 0;
    double gamma = p.gamma ? p.gamma.get(c) : 1;
    if (p.dgamma) p.dgamma.set(c, a * corrected + b * sum);
    if (p.dbeta) p.dbeta.set(c, sum);
    if (p.dadjustment_scale) p.dadjustment_scale.set(c, gamma * corrected);
    if (p.dadjustment_bias) p.dadjustment_bias.set(c, gamma * sum);
  }
}

// n values from the i-th on, as they are where the types agree.
template <class Value>
void read(const Values& from, int64_t i, int64_t n, Value* to) {
  if (from.wide == (sizeof(Value) == 8))
    std::memcpy(to, static_cast<const Value*>(from.data) + i, static_cast<size_t>(n) * sizeof(Value));
  else
    for (int64_t c = 0; c < n; c++) to[c] = static_cast<Value>(from.get(i + c));
}
template <class Value>
void write(const Values& to, int64_t i, int64_t n, const Value* from) {
  if (to.wide == (sizeof(Value) == 8))
    std::memcpy(static_cast<Value*>(to.data) + i, from, static_cast<size_t>(n) * sizeof(Value));
  else
    for (int64_t c = 0; c < n; c++) to.set(i + c, static_cast<double>(from[c]));
}

// ---- Forward.

template <class S>
void forward_inner(const Forward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  bool serial = v.size() < SERIAL, renorm = static_cast<bool>(p.renorm_mean), wait = renorm && !v.own;
  int64_t block = Inner<S>::block(v, 1, wait, serial);
  run_tasks(ceil_div(v.features, block), serial, [&](int64_t task) {
    int64_t c0 = task * block, c1 = least(v.features, c0 + block), width = c1 - c0;
    int64_t kept = wait ? v.groups : 1;  // groups to be measured before any can be normalized
    Carver carver(Slot::task, (kept * 2 + 6) * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
    double *mean = carver.take<double>(kept * width), *variance = carver.take<double>(kept * width);
    double *factor = carver.take<double>(width), *offset = carver.take<double>(width);
    double* deltas = carver.take<double>(width);
    Inner<S> inner(v, carver, width);
    Value *origin = carver.take<Value>(width), *scale = carver.take<Value>(width), *shift = carver.take<Value>(width);
    auto finish = [&](int64_t g, const double* m, const double* var) {
      coefficients(width, p.epsilon, factor, offset, m, var, origin, scale, shift);
      inner.scale(x, y, g, c0, c1, origin, scale, shift);
    };
    if (!renorm && !v.own) options(p, c0, width, factor, offset);
    for (int64_t g = 0; g < v.groups; g++) {
      int64_t i = g * v.features + c0;
      double *m = mean + (wait ? g * width : 0), *var = variance + (wait ? g * width : 0);
      inner.moments(x, g, c0, c1, m, var, origin, deltas);
      write(p.mean, i, width, m);
      write(p.variance, i, width, var);
      if (wait) continue;
      if (renorm) correction(p, i, width, m, var);
      if (v.own) options(p, i, width, factor, offset);
      finish(g, m, var);
    }
    if (!wait) return;
    double groups = static_cast<double>(most<int64_t>(v.groups, 1));
    for (int64_t c = 0; c < width; c++) {
      double m = 0, var = 0;
      for (int64_t g = 0; g < v.groups; g++) m += mean[g * width + c], var += variance[g * width + c];
      m /= groups, var /= groups;
      correction(p, c0 + c, 1, &m, &var);
    }
    options(p, c0, width, factor, offset);
    for (int64_t g = v.groups - 1; g >= 0; g--) finish(g, mean + g * width, variance + g * width);
  });
}

// Moments of a whole batch in pieces that go to several threads, put together in a fixed order. `take(c0, c1, mean,
// variance)` gets those of features [c0, c1), on several threads too.
template <class S>
int64_t moments_whole_bytes(const View& v, int64_t pieces) {
  return 3 * (pieces * (Rows<S>{v}.wide() + 16) * 8 + 64);
}

template <class S, class Take>
void moments_whole(Carver& carver, const View& v, const typename S::Stored* x, bool serial, int64_t pieces,
                   Take&& take) {
  using Value = typename S::Value;
  Rows<S> rows{v};
  int64_t wide = (rows.wide() + 15) / 16 * 16;
  double *sums = carver.take<double>(pieces * wide), *squares = carver.take<double>(pieces * wide);
  Value* origins = carver.take<Value>(pieces * wide);
  run_tasks(pieces, serial, [&](int64_t j) {
    rows.moments(x, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origins + j * wide, sums + j * wide,
                 squares + j * wide);
  });
  constexpr int64_t FEATURES = 256;  // in one task
  double inverse = v.rows ? 1 / static_cast<double>(v.rows) : 0;
  run_tasks(ceil_div(v.features, FEATURES), serial || v.features <= FEATURES, [&](int64_t task) {
    int64_t c0 = task * FEATURES, width = least(v.features - c0, FEATURES);
    double mean[FEATURES], variance[FEATURES];
    for (int64_t c = 0; c < width; c++) mean[c] = variance[c] = 0;
    auto each = [&](auto&& add) {
      for (int64_t j = 0; j < pieces; j++)
        add(static_cast<double>(rows.begin(j + 1, pieces) - rows.begin(j, pieces)), j * wide + c0);
    };
    each([&](double n, int64_t at) {
      for (int64_t c = 0; c < width; c++) mean[c] += sums[at + c] + n * static_cast<double>(origins[at + c]);
    });
    for (int64_t c = 0; c < width; c++) mean[c] *= inverse;
    each([&](double n, int64_t at) {  // each piece measured from the mean of all
      for (int64_t c = 0; c < width; c++) {
        double apart = static_cast<double>(origins[at + c]) - mean[c];
        variance[c] += squares[at + c] + apart * (2 * sums[at + c] + n * apart);
      }
    });
    for (int64_t c = 0; c < width; c++) {
      variance[c] *= inverse;
      variance[c] = variance[c] < 0 ? 0 : variance[c];
    }
    take(c0, c0 + width, mean, variance);
  });
}

template <class S>
void forward_rows_whole(const Forward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  int64_t wide = rows.wide(), pieces = rows.pieces(serial);
  Carver carver(Slot::call, 5 * (wide * 8 + 64) + moments_whole_bytes<S>(v, pieces));
  Value *origin = carver.take<Value>(wide), *scale = carver.take<Value>(wide), *shift = carver.take<Value>(wide);
  double *factor = carver.take<double>(wide), *offset = carver.take<double>(wide);
  moments_whole<S>(carver, v, x, serial, pieces, [&](int64_t c0, int64_t c1, const double* mean, const double* variance) {
    write(p.mean, c0, c1 - c0, mean);
    write(p.variance, c0, c1 - c0, variance);
    if (p.renorm_mean) correction(p, c0, c1 - c0, mean, variance);
    options(p, c0, c1 - c0, factor + c0, offset + c0);
    coefficients(c1 - c0, p.epsilon, factor + c0, offset + c0, mean, variance, origin + c0, scale + c0, shift + c0);
  });
  rows.spread(origin);
  rows.spread(scale);
  rows.spread(shift);
  run_tasks(pieces, serial, [&](int64_t task) {
    int64_t j = pieces - 1 - task;
    rows.scale(x, y, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origin, scale, shift);
  });
}

// Groups are cut into blocks, a task each.
struct GroupBlocks {
  int64_t tasks, size;
  GroupBlocks(const View& v, bool serial) {
    tasks = serial ? 1 : least<int64_t>(v.groups, 4 * num_threads());
    size = ceil_div(v.groups, most<int64_t>(tasks, 1));
  }
};

template <class S>
void forward_rows_groups(const Forward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  bool serial = v.size() < SERIAL, renorm = static_cast<bool>(p.renorm_mean);
  Rows<S> rows{v};
  int64_t f = v.features;
  GroupBlocks blocks(v, serial);
  Carver call(Slot::call, 4 * (f * 8 + 64));
  double *shared_factor = call.take<double>(f), *shared_offset = call.take<double>(f);
  auto phase = [&](bool measure, bool normalize) {
    run_tasks(blocks.tasks, serial, [&](int64_t task) {
      Carver carver(Slot::task, 9 * (f * 8 + 64));
      double *sum = carver.take<double>(f), *squares = carver.take<double>(f);
      double *factor = v.own ? carver.take<double>(f) : shared_factor;
      double *offset = v.own ? carver.take<double>(f) : shared_offset;
      Value *mean = carver.take<Value>(f), *variance = carver.take<Value>(f);
      Value *origin = carver.take<Value>(f), *scale = carver.take<Value>(f), *shift = carver.take<Value>(f);
      for (int64_t g = task * blocks.size; g < least(v.groups, (task + 1) * blocks.size); g++) {
        if (measure) {
          rows.group_moments(x, g, mean, variance, sum, squares);
          write(p.mean, g * f, f, mean);
          write(p.variance, g * f, f, variance);
        } else {
          read(p.mean, g * f, f, mean);
          read(p.variance, g * f, f, variance);
        }
        if (v.own) {
          if (renorm) correction(p, g * f, f, mean, variance);
          options(p, g * f, f, factor, offset);
        }
        if (normalize) {
          coefficients(f, p.epsilon, factor, offset, mean, variance, origin, scale, shift);
          rows.scale(x, y, g, 0, rows.group_rows(), origin, scale, shift);
        }
      }
    });
  };
  if (v.own) return phase(true, true);
  if (!renorm) {
    options(p, 0, f, shared_factor, shared_offset);
    return phase(true, true);
  }
  phase(true, false);
  double *mean = call.take<double>(f), *variance = call.take<double>(f);
  double share = 1 / static_cast<double>(most<int64_t>(v.groups, 1));
  for (int64_t c = 0; c < f; c++) mean[c] = variance[c] = 0;
  for (int64_t g = 0; g < v.groups; g++)
    for (int64_t c = 0; c < f; c++) {
      mean[c] += p.mean.get(g * f + c) * share;
      variance[c] += p.variance.get(g * f + c) * share;
    }
  correction(p, 0, f, mean, variance);
  options(p, 0, f, shared_factor, shared_offset);
  phase(false, true);
}

template <class S>
void forward(const Forward& p) {
  will_write(p.y, p.view.bytes(p.type));
  if (p.view.inner > 1) return forward_inner<S>(p);
  if (p.view.groups == 1) return forward_rows_whole<S>(p);
  forward_rows_groups<S>(p);
}

// ---- Backward.

template <class S>
void backward_inner(const Backward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  bool serial = v.size() < SERIAL;
  int64_t block = Inner<S>::block(v, 2, false, serial);
  run_tasks(ceil_div(v.features, block), serial, [&](int64_t task) {
    int64_t c0 = task * block, c1 = least(v.features, c0 + block), width = c1 - c0;
    Carver carver(Slot::task, 10 * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
    double *sum = carver.take<double>(width), *centered = carver.take<double>(width);
    double *all = carver.take<double>(width), *normalized = carver.take<double>(width);
    double* factor = carver.take<double>(width);
    Value *origin = carver.take<Value>(width), *variance = carver.take<Value>(width);
    Value *dy_weight = carver.take<Value>(width), *x_weight = carver.take<Value>(width);
    Value* constant = carver.take<Value>(width);
    Inner<S> inner(v, carver, width);
    for (int64_t g = 0; g < v.groups; g++) {
      int64_t i = g * v.features + c0, own = v.own ? i : c0;
      if (g == 0 || v.own) {
        options(p, own, width, factor);
        for (int64_t c = 0; c < width; c++) all[c] = normalized[c] = 0;
      }
      read(p.mean, i, width, origin);
      read(p.variance, i, width, variance);
      inner.sums(x, dy, g, c0, c1, origin, sum, centered);
      combination(width, v.count(), p.epsilon, factor, variance, sum, centered, dy_weight, x_weight, constant, all,
                  normalized);
      inner.combine(x, dy, dx, g, c0, c1, origin, dy_weight, x_weight, constant);
      if (g == v.groups - 1 || v.own) parameter_gradients(p, own, width, all, normalized);
    }
  });
}

template <class S>
int64_t sums_whole_bytes(const View& v, int64_t pieces) {
  return 2 * (pieces * (Rows<S>{v}.wide() + 16) * 8 + 64);
}

// Sums over a whole batch, in the first piece of `sums` and of `centered`.
template <class S>
void sums_whole(Carver& carver, const View& v, const typename S::Stored* x, const typename S::Stored* dy,
                const typename S::Value* origin, bool serial, int64_t pieces, double*& sums, double*& centered) {
  Rows<S> rows{v};
  int64_t wide = (rows.wide() + 15) / 16 * 16;
  sums = carver.take<double>(pieces * wide);
  centered = carver.take<double>(pieces * wide);
  run_tasks(pieces, serial, [&](int64_t j) {
    rows.sums(x, dy, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origin, sums + j * wide,
              centered + j * wide);
  });
  for (int64_t j = 1; j < pieces; j++)
    for (int64_t c = 0; c < v.features; c++) {
      sums[c] += sums[j * wide + c];
      centered[c] += centered[j * wide + c];
    }
}

template <class S>
void backward_rows_whole(const Backward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  int64_t wide = rows.wide(), pieces = rows.pieces(serial);
  Carver carver(Slot::call, 8 * (wide * 8 + 64) + sums_whole_bytes<S>(v, pieces));
  Value *origin = carver.take<Value>(wide), *variance = carver.take<Value>(wide);
  Value *dy_weight = carver.take<Value>(wide), *x_weight = carver.take<Value>(wide);
  Value* constant = carver.take<Value>(wide);
  double *factor = carver.take<double>(wide), *all = carver.take<double>(wide), *normalized = carver.take<double>(wide);
  read(p.mean, 0, v.features, origin);
  read(p.variance, 0, v.features, variance);
  rows.spread(origin);
  options(p, 0, v.features, factor);
  double *sums, *centered;
  sums_whole<S>(carver, v, x, dy, origin, serial, pieces, sums, centered);
  for (int64_t c = 0; c < v.features; c++) all[c] = normalized[c] = 0;
  combination(v.features, v.count(), p.epsilon, factor, variance, sums, centered, dy_weight, x_weight, constant, all,
              normalized);
  parameter_gradients(p, 0, v.features, all, normalized);
  rows.spread(dy_weight);
  rows.spread(x_weight);
  rows.spread(constant);
  run_tasks(pieces, serial, [&](int64_t task) {
    int64_t j = pieces - 1 - task;
    rows.combine(x, dy, dx, 0, rows.begin(j, pieces), rows.begin(j + 1, pieces), origin, dy_weight, x_weight, constant);
  });
}

template <class S>
void backward_rows_groups(const Backward& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  int64_t n = rows.group_rows(), f = v.features;
  GroupBlocks blocks(v, serial);
  Carver call(Slot::call, 2 * (blocks.tasks * f * 8 + 64) + f * 8 + 64);
  double *all = call.take<double>(blocks.tasks * f), *normalized = call.take<double>(blocks.tasks * f);
  double* shared_factor = call.take<double>(f);
  if (!v.own) options(p, 0, f, shared_factor);
  run_tasks(blocks.tasks, serial, [&](int64_t task) {
    Carver carver(Slot::task, 8 * (f * 8 + 64));
    double *sum = carver.take<double>(f), *centered = carver.take<double>(f);
    double* factor = v.own ? carver.take<double>(f) : shared_factor;
    Value *origin = carver.take<Value>(f), *variance = carver.take<Value>(f);
    Value *dy_weight = carver.take<Value>(f), *x_weight = carver.take<Value>(f), *constant = carver.take<Value>(f);
    double *own_all = all + task * f, *own_normalized = normalized + task * f;
    auto clear = [&] {
      for (int64_t c = 0; c < f; c++) own_all[c] = own_normalized[c] = 0;
    };
    clear();
    for (int64_t g = task * blocks.size; g < least(v.groups, (task + 1) * blocks.size); g++) {
      if (v.own) options(p, g * f, f, factor);
      read(p.mean, g * f, f, origin);
      read(p.variance, g * f, f, variance);
      rows.sums(x, dy, g, 0, n, origin, sum, centered);
      combination(f, v.count(), p.epsilon, factor, variance, sum, centered, dy_weight, x_weight, constant, own_all,
                  own_normalized);
      rows.combine(x, dy, dx, g, 0, n, origin, dy_weight, x_weight, constant);
      if (v.own) {
        parameter_gradients(p, g * f, f, own_all, own_normalized);
        clear();
      }
    }
  });
  if (v.own) return;
  for (int64_t task = 1; task < blocks.tasks; task++)
    for (int64_t c = 0; c < f; c++) {
      all[c] += all[task * f + c];
      normalized[c] += normalized[task * f + c];
    }
  parameter_gradients(p, 0, f, all, normalized);
}

template <class S>
void backward(const Backward& p) {
  will_write(p.dx, p.view.bytes(p.type));
  if (p.view.inner > 1) return backward_inner<S>(p);
  if (p.view.groups == 1) return backward_rows_whole<S>(p);
  backward_rows_groups<S>(p);
}

// ---- The passes by themselves. `body(group, c0, c1)` works on features [c0, c1) with features in the middle.

template <class S, class Body>
void by_features(const View& v, int64_t arrays, Body&& body) {
  bool serial = v.size() < SERIAL;
  int64_t block = Inner<S>::block(v, arrays, false, serial);
  run_tasks(ceil_div(v.features, block), serial, [&](int64_t task) {
    for (int64_t g = 0; g < v.groups; g++) body(g, task * block, least(v.features, (task + 1) * block));
  });
}

// `body(group, begin, end)` works on rows [begin, end) of a group with features last.
template <class S, class Body>
void by_rows(const View& v, Body&& body) {
  bool serial = v.size() < SERIAL;
  Rows<S> rows{v};
  if (v.groups == 1) {
    int64_t pieces = rows.pieces(serial);
    run_tasks(pieces, serial, [&](int64_t j) { body(0, rows.begin(j, pieces), rows.begin(j + 1, pieces)); });
    return;
  }
  GroupBlocks blocks(v, serial);
  run_tasks(blocks.tasks, serial, [&](int64_t task) {
    for (int64_t g = task * blocks.size; g < least(v.groups, (task + 1) * blocks.size); g++)
      body(g, 0, rows.group_rows());
  });
}

template <class S>
void moments(const Moments& p) {
  using Value = typename S::Value;
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  if (v.inner > 1) {
    by_features<S>(v, 1, [&](int64_t g, int64_t c0, int64_t c1) {
      int64_t width = c1 - c0;
      Carver carver(Slot::task, 4 * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
      double *mean = carver.take<double>(width), *variance = carver.take<double>(width);
      double* deltas = carver.take<double>(width);
      Inner<S> inner(v, carver, width);
      inner.moments(x, g, c0, c1, mean, variance, carver.take<Value>(width), deltas);
      write(p.mean, g * v.features + c0, width, mean);
      write(p.variance, g * v.features + c0, width, variance);
    });
  } else if (v.groups == 1) {
    bool serial = v.size() < SERIAL;
    int64_t pieces = Rows<S>{v}.pieces(serial);
    Carver carver(Slot::call, moments_whole_bytes<S>(v, pieces));
    moments_whole<S>(carver, v, x, serial, pieces,
                     [&](int64_t c0, int64_t c1, const double* mean, const double* variance) {
                       write(p.mean, c0, c1 - c0, mean);
                       write(p.variance, c0, c1 - c0, variance);
                     });
  } else {
    by_rows<S>(v, [&](int64_t g, int64_t, int64_t) {
      Carver carver(Slot::task, 4 * (v.features * 8 + 64));
      double *sum = carver.take<double>(v.features), *squares = carver.take<double>(v.features);
      Value *mean = carver.take<Value>(v.features), *variance = carver.take<Value>(v.features);
      Rows<S>{v}.group_moments(x, g, mean, variance, sum, squares);
      write(p.mean, g * v.features, v.features, mean);
      write(p.variance, g * v.features, v.features, variance);
    });
  }
}

// Coefficients of one group in the type of the arithmetic, repeated over a wide row.
template <class S, int N>
struct Prepared {
  typename S::Value* values[N];
  Prepared(const View& v, const Values* const (&given)[N], int64_t group, int64_t c0, int64_t c1, int64_t wide) {
    Carver carver(Slot::task, N * (wide * 8 + 64));
    for (int k = 0; k < N; k++) {
      values[k] = carver.take<typename S::Value>(wide);
      for (int64_t c = 0; !given[k] && c < c1 - c0; c++) values[k][c] = 0;
      if (given[k]) read(*given[k], group * v.features + c0, c1 - c0, values[k]);
      if (wide > c1 - c0) Rows<S>{v}.spread(values[k]);
    }
  }
};

template <class S>
void scale_shift(const ScaleShift& p) {
  const View& v = p.view;
  const auto* x = static_cast<const typename S::Stored*>(p.x);
  auto* y = static_cast<typename S::Stored*>(p.y);
  const Values* const given[3] = {nullptr, &p.scale, &p.shift};
  will_write(y, v.bytes(p.type));
  if (v.inner > 1)
    by_features<S>(v, 1, [&](int64_t g, int64_t c0, int64_t c1) {
      Carver call(Slot::call, Inner<S>::scratch_bytes(v, c1 - c0));
      Prepared<S, 3> by(v, given, g, c0, c1, c1 - c0);
      Inner<S>(v, call, c1 - c0).scale(x, y, g, c0, c1, by.values[0], by.values[1], by.values[2]);
    });
  else
    by_rows<S>(v, [&](int64_t g, int64_t begin, int64_t end) {
      Prepared<S, 3> by(v, given, g, 0, v.features, Rows<S>{v}.wide());
      Rows<S>{v}.scale(x, y, g, begin, end, by.values[0], by.values[1], by.values[2]);
    });
}

template <class S>
void gradient_sums(const GradientSums& p) {
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  const Values* const given[1] = {&p.mean};
  if (v.inner > 1) {
    by_features<S>(v, 2, [&](int64_t g, int64_t c0, int64_t c1) {
      int64_t width = c1 - c0;
      Carver call(Slot::call, 2 * (width * 8 + 64) + Inner<S>::scratch_bytes(v, width));
      double *sum = call.take<double>(width), *centered = call.take<double>(width);
      Prepared<S, 1> by(v, given, g, c0, c1, width);
      Inner<S>(v, call, width).sums(x, dy, g, c0, c1, by.values[0], sum, centered);
      write(p.dy_sum, g * v.features + c0, width, sum);
      write(p.dy_centered_sum, g * v.features + c0, width, centered);
    });
  } else if (v.groups == 1) {
    bool serial = v.size() < SERIAL;
    int64_t wide = Rows<S>{v}.wide(), pieces = Rows<S>{v}.pieces(serial);
    Carver call(Slot::call, wide * 8 + 64 + sums_whole_bytes<S>(v, pieces));
    auto* origin = call.take<typename S::Value>(wide);
    read(p.mean, 0, v.features, origin);
    Rows<S>{v}.spread(origin);
    double *sums, *centered;
    sums_whole<S>(call, v, x, dy, origin, serial, pieces, sums, centered);
    write(p.dy_sum, 0, v.features, sums);
    write(p.dy_centered_sum, 0, v.features, centered);
  } else {
    by_rows<S>(v, [&](int64_t g, int64_t begin, int64_t end) {
      Carver call(Slot::call, 2 * (v.features * 8 + 64));
      double *sum = call.take<double>(v.features), *centered = call.take<double>(v.features);
      Prepared<S, 1> by(v, given, g, 0, v.features, v.features);
      Rows<S>{v}.sums(x, dy, g, begin, end, by.values[0], sum, centered);
      write(p.dy_sum, g * v.features, v.features, sum);
      write(p.dy_centered_sum, g * v.features, v.features, centered);
    });
  }
}

template <class S>
void gradient_combine(const GradientCombine& p) {
  const View& v = p.view;
  const auto *x = static_cast<const typename S::Stored*>(p.x), *dy = static_cast<const typename S::Stored*>(p.dy);
  auto* dx = static_cast<typename S::Stored*>(p.dx);
  const Values* const given[4] = {nullptr, &p.dy_weight, &p.x_weight, &p.constant};
  will_write(dx, v.bytes(p.type));
  if (v.inner > 1)
    by_features<S>(v, 2, [&](int64_t g, int64_t c0, int64_t c1) {
      Carver call(Slot::call, Inner<S>::scratch_bytes(v, c1 - c0));
      Prepared<S, 4> by(v, given, g, c0, c1, c1 - c0);
      Inner<S>(v, call, c1 - c0).combine(x, dy, dx, g, c0, c1, by.values[0], by.values[1], by.values[2], by.values[3]);
    });
  else
    by_rows<S>(v, [&](int64_t g, int64_t begin, int64_t end) {
      Prepared<S, 4> by(v, given, g, 0, v.features, Rows<S>{v}.wide());
      Rows<S>{v}.combine(x, dy, dx, g, begin, end, by.values[0], by.values[1], by.values[2], by.values[3]);
    });
}

template <class P, void (*f32)(const P&), void (*f64)(const P&), void (*f16)(const P&), void (*bf16)(const P&)>
void by_type(const P& p) {
  switch (p.type) {
    case Type::float32: return f32(p);
    case Type::float64: return f64(p);
    case Type::float16: return f16(p);
    case Type::bfloat16: return bf16(p);
  }
}

}  // namespace

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

#define EVERY_TYPE(operation) operation<Float32>, operation<Float64>, operation<Float16>, operation<BFloat16>

extern const Kernels NAME(BATCHNORM_ISA);
const Kernels NAME(BATCHNORM_ISA) = {
    TEXT(BATCHNORM_ISA),
    by_type<Forward, EVERY_TYPE(forward)>,
    by_type<Backward, EVERY_TYPE(backward)>,
    by_type<Moments, EVERY_TYPE(moments)>,
    by_type<ScaleShift, EVERY_TYPE(scale_shift)>,
    by_type<GradientSums, EVERY_TYPE(gradient_sums)>,
    by_type<GradientCombine, EVERY_TYPE(gradient_combine)>,
};

}  // namespace batchnorm
