// Calls every operation over many views, types and options, on buffers of exactly the size that they need, for the
// sanitizers to watch; see `make sanitize`. With the argument "threads", from several threads at once while the number
// of threads of the pool changes; with "few", over every fourth view, for an emulator.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "kernels.hpp"
#include "threads.hpp"

using namespace batchnorm;

namespace {

std::atomic<int> failures{0};

void expect(bool holds, const char* what, const View& v, Type type) {
  if (holds) return;
  failures++;
  std::fprintf(stderr, "%s: rows %lld groups %lld span %lld features %lld inner %lld type %d\n", what,
               static_cast<long long>(v.rows), static_cast<long long>(v.groups), static_cast<long long>(v.span),
               static_cast<long long>(v.features), static_cast<long long>(v.inner), static_cast<int>(type));
}

// Small whole numbers and halves, which every type holds exactly.
struct Data {
  Type type;
  std::vector<char> bytes;

  Data(Type type, int64_t n) : type(type), bytes(static_cast<size_t>(n * size_of(type))) {}
  // By malloc underneath, so that the end of the vector is the end of what may be touched.
  void* data() { return bytes.data(); }
  double get(int64_t i) const {
    if (type == Type::float64) return read<double>(i);
    if (type == Type::float32) return read<float>(i);
    uint32_t h = read<uint16_t>(i), word = h << 16;
    if (type == Type::float16) {
      if ((h & 0x7c00) == 0x7c00) return NAN;
      double magnitude = (h & 0x7c00) ? std::ldexp((h & 0x3ff) | 0x400, static_cast<int>(h >> 10 & 31) - 25)
                                      : std::ldexp(h & 0x3ff, -24);
      return h & 0x8000 ? -magnitude : magnitude;
    }
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  void set(int64_t i, int halves) {  // value = halves / 2, |halves| < 128
    float value = static_cast<float>(halves) / 2;
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (type == Type::float64) return write<double>(i, value);
    if (type == Type::float32) return write<float>(i, value);
    if (type == Type::bfloat16) return write<uint16_t>(i, static_cast<uint16_t>(word >> 16));
    uint32_t half = word & 0x7fffffff ? ((word & 0x7fffffff) - 0x38000000) >> 13 : 0;
    write<uint16_t>(i, static_cast<uint16_t>(half | (word >> 16 & 0x8000)));
  }

  void set_nan(int64_t i) {
    if (type == Type::float64) return write<double>(i, NAN);
    if (type == Type::float32) return write<float>(i, NAN);
    write<uint16_t>(i, type == Type::bfloat16 ? 0x7fc0 : 0x7e00);
  }

 private:
  template <class T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  template <class T>
  void write(int64_t i, T value) {
    std::memcpy(bytes.data() + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }
};

// Float or double statistics of exact size.
struct Statistics {
  std::vector<char> bytes;
  Values values;

  Statistics(int64_t n, bool doubles, double fill = 0) : bytes(static_cast<size_t>(n * (doubles ? 8 : 4))) {
    values = {bytes.data(), doubles};
    for (int64_t i = 0; i < n; i++) values.set(i, fill + 0.25 * static_cast<double>(i % 3));
  }
  Statistics(const Statistics&) = delete;
};

bool near(double value, double expected, double scale, double part) {
  return std::fabs(value - expected) <= part * (std::fabs(expected) + scale);
}

void exercise(const View& v, Type type, unsigned seed) {
  std::mt19937 random(seed);
  int64_t n = v.size(), all = v.statistics(), f = v.parameters();
  bool doubles = type == Type::float64 || seed % 2;
  Data x(type, n), dy(type, n), y(type, n), dx(type, n);
  for (int64_t i = 0; i < n; i++) {
    x.set(i, static_cast<int>(random() % 15) - 4);
    dy.set(i, static_cast<int>(random() % 9) - 4);
  }
  // Sums in plain loops.
  std::vector<double> sum(static_cast<size_t>(all)), square(sum), dys(sum), centered(sum);
  auto at = [&](int64_t i) {
    int64_t row = i / (v.features * v.inner), feature = i / v.inner % v.features;
    return static_cast<size_t>(row / v.span % v.groups * v.features + feature);
  };
  for (int64_t i = 0; i < n; i++) {
    double value = x.get(i);
    sum[at(i)] += value;
    square[at(i)] += value * value;
  }
  double count = static_cast<double>(v.group_rows() ? v.group_rows() * v.inner : 1);
  for (int64_t i = 0; i < n; i++) {
    dys[at(i)] += dy.get(i);
    centered[at(i)] += dy.get(i) * (x.get(i) - sum[at(i)] / count);
  }
  double part = type == Type::float64    ? (doubles ? 1e-9 : 1e-4)
                : type == Type::float32  ? 1e-4
                : type == Type::bfloat16 ? 1.6e-2
                                         : 2e-3;

  Statistics mean(all, doubles), variance(all, doubles);
  kernels().moments({type, v, x.data(), mean.values, variance.values, {}});
  for (int64_t c = 0; c < all; c++) {
    double m = sum[static_cast<size_t>(c)] / count, s = square[static_cast<size_t>(c)] / count - m * m;
    expect(near(mean.values.get(c), m, 1, 1e-5), "mean", v, type);
    expect(near(variance.values.get(c), s, 1, 1e-5), "variance", v, type);
  }

  Statistics center(all, doubles, 0.25), scale(all, doubles, 0.5), shift(all, doubles, -0.5), c(all, doubles, 1);
  kernels().normalize({type, v, x.data(), y.data(), center.values, scale.values, shift.values, {}});
  kernels().gradient_combine(
      {type, v, x.data(), dy.data(), dx.data(), center.values, scale.values, shift.values, c.values, {}});
  for (int64_t i = 0; i < n; i++) {
    auto k = static_cast<int64_t>(at(i));
    double distance = x.get(i) - center.values.get(k);
    double expected = distance * scale.values.get(k) + shift.values.get(k);
    expect(near(y.get(i), expected, 1, part), "normalize", v, type);
    expected = dy.get(i) * scale.values.get(k) + distance * shift.values.get(k) + c.values.get(k);
    expect(near(dx.get(i), expected, 8, part), "gradient_combine", v, type);
  }
  Statistics plain(all, doubles), product(all, doubles);
  kernels().gradient_sums({type, v, x.data(), dy.data(), mean.values, plain.values, product.values, {}});
  for (int64_t k = 0; k < all; k++) {
    expect(near(plain.values.get(k), dys[static_cast<size_t>(k)], count, 1e-5), "dy_sum", v, type);
    expect(near(product.values.get(k), centered[static_cast<size_t>(k)], 8 * count, 1e-5), "dy_centered_sum", v, type);
  }

  for (unsigned mask = 0; mask < 8; mask++) {
    if (n > 4096 && mask % 3) continue;  // 0, 3 and 6
    Statistics factor(f, doubles, 0.5), offset(f, doubles), average(f, doubles), stddev(f, doubles, 1);
    Statistics r(f, doubles), d(f, doubles), dfactor(f, doubles), doffset(f, doubles);
    Forward p{};
    p.type = type, p.view = v, p.x = x.data(), p.y = y.data(), p.epsilon = 1e-3;
    p.rmin = 0.5, p.rmax = 2, p.dmax = 1;
    p.mean = mean.values, p.variance = variance.values;
    Backward q{};
    q.type = type, q.view = v, q.x = x.data(), q.dy = dy.data(), q.dx = dx.data(), q.epsilon = 1e-3;
    q.mean = mean.values, q.variance = variance.values;
    if (mask & 1) q.factor = p.factor = factor.values, q.dfactor = dfactor.values;
    if (mask & 2) p.offset = offset.values, q.doffset = doffset.values;
    if (mask & 4) {
      p.renorm_mean = average.values, p.renorm_stddev = stddev.values;
      p.r = q.r = r.values, p.d = q.d = d.values;
    }
    kernels().forward(p);
    kernels().backward(q);
    if (mask % 2) {  // the same from moments that are given
      p.measured = true;
      kernels().forward(p);
    }
    for (int64_t i = 0; i < n; i += 1 + n / 997) {
      auto g = static_cast<int64_t>(at(i)), k = v.grouped_parameters ? g : g % v.features;
      double m = sum[static_cast<size_t>(g)] / count;
      double value = (x.get(i) - m) / std::sqrt(std::fmax(0, square[static_cast<size_t>(g)] / count - m * m) + 1e-3);
      if (mask & 4) value = value * r.values.get(k) + d.values.get(k);
      if (mask & 1) value *= factor.values.get(k);
      if (mask & 2) value += offset.values.get(k);
      expect(near(y.get(i), value, 1, part), "forward", v, type);
      expect(std::isfinite(dx.get(i)), "backward", v, type);
    }
    if (mask & 2)
      for (int64_t k = 0; k < f; k++) {
        double expected = 0;
        for (int64_t g = 0; g < v.groups; g++)
          if (!v.grouped_parameters || k / v.features == g)
            expected += dys[static_cast<size_t>(g * v.features + k % v.features)];
        expect(near(doffset.values.get(k), expected, count * static_cast<double>(v.groups), 1e-5), "doffset", v, type);
      }
  }
}

// A step with weights, over groups of any sizes: moments and their counts in plain loops, NaN beneath the mask, and
// what becomes of it.
void exercise_weights(const View& v, Type type, unsigned seed) {
  std::mt19937 random(seed);
  int64_t n = v.size(), all = v.statistics(), f = v.parameters(), positions = v.positions();
  bool doubles = type == Type::float64 || seed % 2, zeroed = seed / 2 % 2;
  // Booleans or real weights; by position, in stretches, or all of one kind.
  auto kind = static_cast<Weights::Kind>(seed / 4 % 3);
  unsigned pattern = seed / 3 % 5, length = pattern == 1 ? 7 : 150, value = 1;
  std::vector<double> weights(static_cast<size_t>(positions));
  for (size_t i = 0; i < weights.size(); i++) {
    if (pattern == 0 || i % length == 0) value = random() % 3;
    weights[i] = pattern == 3 ? 1 : pattern == 4 ? 0 : kind == Weights::bytes ? value > 0 : value * 0.5;
  }
  std::vector<char> given(weights.size() * (kind == Weights::bytes ? 1 : kind == Weights::floats ? 4 : 8));
  for (size_t i = 0; i < weights.size(); i++) {
    if (kind == Weights::bytes)
      given[i] = weights[i] > 0;
    else
      Values{given.data(), kind == Weights::doubles}.set(static_cast<int64_t>(i), weights[i]);
  }
  auto weight = [&](int64_t i) {
    int64_t row = i / (v.features * v.inner);
    if (v.shares_weights()) row = row / (v.groups * v.span) * v.span + row % v.span;
    return weights[static_cast<size_t>(row * v.inner + i % v.inner)];
  };
  auto at = [&](int64_t i) {
    int64_t row = i / (v.features * v.inner), feature = i / v.inner % v.features;
    return static_cast<size_t>(row / v.span % v.groups * v.features + feature);
  };
  Data x(type, n), dy(type, n), y(type, n), dx(type, n);
  std::vector<double> count(static_cast<size_t>(all)), sum(count), square(count), dys(count);
  for (int64_t i = 0; i < n; i++) {
    x.set(i, static_cast<int>(random() % 15) - 4);
    dy.set(i, static_cast<int>(random() % 9) - 4);
    double w = weight(i);
    count[at(i)] += w;
    sum[at(i)] += w * x.get(i);
    square[at(i)] += w * x.get(i) * x.get(i);
    if (w > 0 || !zeroed) dys[at(i)] += dy.get(i);
    if (w > 0) continue;
    x.set_nan(i);
    if (zeroed) dy.set_nan(i);
  }
  Statistics mean(all, doubles), variance(all, doubles), counts(v.counts(), doubles), squares(v.counts(), doubles),
      factor(f, doubles, 0.5), offset(f, doubles), average(f, doubles), stddev(f, doubles, 1), r(f, doubles),
      d(f, doubles), dfactor(f, doubles), doffset(f, doubles);
  Forward p{};
  p.type = type, p.view = v, p.x = x.data(), p.y = y.data(), p.epsilon = 1e-3;
  p.rmin = 0.5, p.rmax = 2, p.dmax = 1;
  p.mean = mean.values, p.variance = variance.values, p.factor = factor.values, p.offset = offset.values;
  p.weights = {given.data(), kind, zeroed};
  p.count = counts.values, p.square_count = squares.values;
  Backward q{};
  q.type = type, q.view = v, q.x = x.data(), q.dy = dy.data(), q.dx = dx.data(), q.epsilon = 1e-3;
  q.mean = mean.values, q.variance = variance.values, q.factor = factor.values;
  q.dfactor = dfactor.values, q.doffset = doffset.values;
  q.weights = p.weights, q.count = counts.values;
  if (seed % 3 == 0) {
    p.renorm_mean = average.values, p.renorm_stddev = stddev.values;
    p.r = q.r = r.values, p.d = q.d = d.values;
  }
  kernels().moments({type, v, x.data(), mean.values, variance.values, p.weights, counts.values, squares.values});
  p.measured = seed % 5 == 0;
  kernels().forward(p);
  kernels().backward(q);
  for (int64_t k = 0; k < all; k++) {
    auto i = static_cast<size_t>(k);
    double number = count[i] > 0 ? count[i] : 1, m = sum[i] / number;
    expect(near(mean.values.get(k), m, 1, 1e-5), "weighted mean", v, type);
    expect(near(variance.values.get(k), square[i] / number - m * m, 1, 1e-5), "weighted variance", v, type);
    if (v.rows > 0)
      expect(near(counts.values.get(v.shares_weights() ? 0 : k / v.features), count[i], 0, 1e-5), "count", v, type);
  }
  for (int64_t i = 0; i < n; i += 1 + n / 997) {
    if (weight(i) > 0) {
      expect(std::isfinite(y.get(i)) && std::isfinite(dx.get(i)), "weighted", v, type);
    } else {
      expect(zeroed ? y.get(i) == 0 && dx.get(i) == 0 : !std::isfinite(y.get(i)), "without weight", v, type);
      expect(std::isfinite(dx.get(i)), "gradient without weight", v, type);
    }
  }
  for (int64_t k = 0; k < f; k++) {
    double expected = 0, values = 1;
    for (int64_t g = 0; g < v.groups; g++)
      if (!v.grouped_parameters || k / v.features == g) {
        expected += dys[static_cast<size_t>(g * v.features + k % v.features)];
        values += static_cast<double>(v.group_rows(g) * v.inner);
      }
    expect(near(doffset.values.get(k), expected, values, 1e-5), "weighted doffset", v, type);
  }
  Statistics running_mean(f, doubles), running_variance(f, doubles, 1);
  Averages averages{};
  averages.view = v, averages.mean = mean.values, averages.variance = variance.values;
  averages.count = counts.values, averages.square_count = squares.values;
  averages.unbiased = true, averages.momentum = 0.5, averages.epsilon = 1e-3;
  averages.running_mean = running_mean.values, averages.running_variance = running_variance.values;
  track(averages);
  Statistics scale(all, doubles, 0.5), shift(all, doubles, -0.5), plain(all, doubles), product(all, doubles);
  kernels().moments({type, v, x.data(), mean.values, variance.values, p.weights});
  kernels().normalize({type, v, x.data(), y.data(), mean.values, scale.values, shift.values, p.weights});
  kernels().gradient_sums({type, v, x.data(), dy.data(), mean.values, plain.values, product.values, p.weights});
  kernels().gradient_combine(
      {type, v, x.data(), dy.data(), dx.data(), mean.values, scale.values, shift.values, shift.values, p.weights});
}

// With as many samples more as there are groups, but one.
View uneven(View v) {
  if (!v.grouped_parameters && v.rows > 0) v.rows += (v.groups - 1) * v.span;
  return v;
}

const Type types[] = {Type::float32, Type::float64, Type::float16, Type::bfloat16};

// Some below and some above the size from which threads are used, of widths that are no multiples of a vector.
std::vector<View> views() {
  std::vector<View> found = {
      {0, 1, 1, 3, 1},     {0, 2, 3, 3, 5},       {1, 1, 1, 1, 1},     {40009, 1, 1, 1, 1}, {11003, 1, 1, 3, 1},
      {1931, 1, 1, 17, 1}, {70, 1, 1, 1031, 1},   {2, 1, 1, 20011, 1}, {1, 1, 1, 1, 40009}, {2, 1, 1, 3, 7001},
      {7, 1, 1, 67, 97},   {9000, 1, 1, 2, 2},    {130, 1, 1, 256, 1}, {131, 1, 1, 257, 1}, {3300, 5, 2, 13, 1},
      {60, 5, 2, 37, 31},  {4000, 2000, 2, 9, 1}, {66, 33, 1, 515, 1}, {12, 3, 4, 4099, 1}, {65, 1, 1, 511, 1},
  };
  for (int64_t groups : {1, 2, 3})
    for (int64_t span : {1, 3})
      for (int64_t features : {1, 2, 3, 5, 7, 8, 13, 16, 31, 33, 67, 129})
        for (int64_t inner : {1, 2, 3, 7, 17, 67})
          for (int64_t times : {1, 2, 3, 9, 65})
            if ((groups + span + features + inner + times) % 4 == 0 || features * inner < 20)
              found.push_back({times * groups * span, groups, span, features, inner, (features + times) % 5 == 0,
                               (features + times) % 10 == 0});
  return found;
}

void at_once() {
  const std::vector<View> large = {{1931, 1, 1, 17, 1}, {40009, 1, 1, 1, 1}, {7, 1, 1, 67, 97},
                                   {3300, 5, 2, 13, 1}, {60, 5, 2, 37, 31},  {70, 1, 1, 1031, 1}};
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (unsigned k = 0; k < 4; k++)
    callers.emplace_back([&, k] {
      for (unsigned round = 0; round < 4; round++)
        for (size_t i = 0; i < large.size(); i++)
          exercise(large[(i + k) % large.size()], types[(round + k) % 4], round),
              exercise_weights(uneven(large[(i + k) % large.size()]), types[(round + k) % 4], round);
    });
  std::thread changing([&] {
    for (int i = 0; !stop; i++) {
      set_num_threads(1 + i % 6);
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  // What a task throws comes to its caller, and the pool goes on; beside the others and alone.
  for (int i = 0; i < 400; i++) {
    if (i == 200) {
      for (auto& caller : callers) caller.join();
      stop = true;
      changing.join();
      set_num_threads(4);
    }
    std::atomic<int> sum{0};
    bool thrown = false;
    try {
      parallel(
          64,
          [](void* context, int64_t task) {
            if (task == 40) throw std::bad_alloc();
            static_cast<std::atomic<int>*>(context)->fetch_add(1);
          },
          &sum);
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    expect(thrown && sum < 64, "thrown", {}, Type::float32);
    sum = 0;
    parallel(64, [](void* context, int64_t) { static_cast<std::atomic<int>*>(context)->fetch_add(1); }, &sum);
    expect(sum == 64, "parallel", {}, Type::float32);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !std::strcmp(arguments[1], "threads")) {
    at_once();
  } else {
    unsigned seed = 0;
    bool few = count > 1 && !std::strcmp(arguments[1], "few");
    for (int threads : {1, 3})
      for (const View& view : views()) {
        if (few && seed % 4) {
          seed++;
          continue;
        }
        set_num_threads(threads);
        exercise(view, types[seed % 4], seed);
        for (unsigned k = 0; k < 3; k++) exercise_weights(k ? uneven(view) : view, types[(seed + k) % 4], seed + 5 * k);
        if (view.size() < 2000 || view.size() > 30000)
          for (unsigned k = 1; k < 4; k++) exercise(view, types[(seed + k) % 4], seed + k);
        seed++;
      }
  }
  std::printf("%s: %d failures\n", kernels().name, failures.load());
  return failures ? 1 : 0;
}
