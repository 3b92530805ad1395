// Vectors of floats, and the types that arrays are stored in. Like every header that instruction_set.cpp includes
// besides the interfaces, this one is compiled once for each instruction set. So none may use an inline function of the
// standard library, for a linker keeps one of several copies, whatever it was compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers name registers that they write whole
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef BATCHNORM_VECTOR_BYTES
#error "CMakeLists.txt says how wide a vector is"
#endif

namespace batchnorm {
namespace {

template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most(T a, T b) {
  return b > a ? b : a;
}

template <int64_t N>
struct Constant {
  static constexpr int64_t value = N;
};

// Vectors of GCC and Clang: operators work by element, and wider ones than the processor has are split.
constexpr int W = BATCHNORM_VECTOR_BYTES / 4;  // floats in a vector
typedef float Floats __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(2 * BATCHNORM_VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(2 * BATCHNORM_VECTOR_BYTES)));
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

// Stores past the caches, to memory; p must be aligned to V. `fence` comes after, before others may read it.
#ifdef __SSE2__
#if BATCHNORM_VECTOR_BYTES == 64
using Streamed = __m512i;
void stream_part(Streamed* p, Streamed v) { _mm512_stream_si512(p, v); }
void stream_part(__m256i* p, __m256i v) { _mm256_stream_si256(p, v); }
#elif BATCHNORM_VECTOR_BYTES == 32
using Streamed = __m256i;
void stream_part(Streamed* p, Streamed v) { _mm256_stream_si256(p, v); }
void stream_part(__m128i* p, __m128i v) { _mm_stream_si128(p, v); }
#else
using Streamed = __m128i;
void stream_part(Streamed* p, Streamed v) { _mm_stream_si128(p, v); }
#endif
template <class V, class P>
void stream_bits(P* p, V v) {
  if constexpr (sizeof v >= sizeof(Streamed)) {
    Streamed parts[sizeof v / sizeof(Streamed)];
    std::memcpy(parts, &v, sizeof v);
    for (size_t i = 0; i < sizeof v / sizeof(Streamed); i++) stream_part(reinterpret_cast<Streamed*>(p) + i, parts[i]);
  } else {
#if BATCHNORM_VECTOR_BYTES == 64
    stream_part(reinterpret_cast<__m256i*>(p), same_bits<__m256i>(v));
#elif BATCHNORM_VECTOR_BYTES == 32
    stream_part(reinterpret_cast<__m128i*>(p), same_bits<__m128i>(v));
#else
    store_bits(p, v);
#endif
  }
}
void fence() { _mm_sfence(); }
#else
template <class V, class P>
void stream_bits(P* p, V v) {
  store_bits(p, v);
}
void fence() {}
#endif

Words choose(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// Types of elements: Stored is what arrays hold, Value what arithmetic is in, Vector W of these.
template <class T, class V>
struct Full {  // stored as it is computed with
  using Stored = T;
  using Value = T;
  using Vector = V;
  static Vector load(const Stored* p) { return load_bits<Vector>(p); }
  static void store(Stored* p, Vector v) { store_bits(p, v); }
  static void stream(Stored* p, Vector v) { stream_bits(p, v); }
  static Value load_single(const Stored* p) { return load_bits<Value>(p); }
  static void store_single(Stored* p, Value v) { store_bits(p, v); }
};
using Float32 = Full<float, Floats>;
using Float64 = Full<double, Doubles>;

// 16-bit words to 32 bits and back, where compilers do not see that it is one instruction.
Words lengthen(Halves h) {
#if BATCHNORM_VECTOR_BYTES == 64
  return same_bits<Words>(_mm512_cvtepu16_epi32(same_bits<__m256i>(h)));
#elif BATCHNORM_VECTOR_BYTES == 32
  return same_bits<Words>(_mm256_cvtepu16_epi32(same_bits<__m128i>(h)));
#else
  return __builtin_convertvector(h, Words);
#endif
}
Halves shorten(Words u) {  // of words less than 2^16
#if BATCHNORM_VECTOR_BYTES == 64
  return same_bits<Halves>(_mm512_cvtepi32_epi16(same_bits<__m512i>(u)));
#elif BATCHNORM_VECTOR_BYTES == 32
  __m256i words = same_bits<__m256i>(u);
  return same_bits<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08)));
#else
  return __builtin_convertvector(u, Halves);
#endif
}

// A 16-bit type by its two conversions of whole vectors; single values go through the first element of one.
template <class Conversion>
struct Half {
  using Stored = uint16_t;
  using Value = float;
  using Vector = Floats;
  static Vector load(const Stored* p) { return Conversion::widen(load_bits<Halves>(p)); }
  static void store(Stored* p, Vector v) { store_bits(p, Conversion::narrow(v)); }
  static void stream(Stored* p, Vector v) { stream_bits(p, Conversion::narrow(v)); }
  static Value load_single(const Stored* p) { return Conversion::widen(Halves{} + load_bits<Stored>(p))[0]; }
  static void store_single(Stored* p, Value v) {
    // Subtracting zero, not adding it, keeps the sign of −0.
    store_bits(p, static_cast<Stored>(Conversion::narrow(v - Floats{})[0]));
  }
};

struct BFloat16Conversion {
  static Floats widen(Halves h) { return same_bits<Floats>(lengthen(h) << 16); }
  static Halves narrow(Floats v) {  // to nearest, ties to even; NaN stays one
#ifdef __AVX512BF16__
    // The instruction takes subnormal numbers for 0.
    if (_mm512_testn_epi32_mask(same_bits<__m512i>(v), _mm512_set1_epi32(0x7f800000)) == 0)
      return same_bits<Halves>(_mm512_cvtneps_pbh(same_bits<__m512>(v)));
#endif
    Words u = same_bits<Words>(v), rounded = u + 0x7fff + ((u >> 16) & 1);
    Words nan = same_bits<Words>(v != v);
    return shorten(choose(nan, u | 0x400000, rounded) >> 16);
  }
};

struct Float16Conversion {
#if BATCHNORM_VECTOR_BYTES == 64
  static Floats widen(Halves h) { return same_bits<Floats>(_mm512_cvtph_ps(same_bits<__m256i>(h))); }
  static Halves narrow(Floats v) {
    return same_bits<Halves>(_mm512_cvtps_ph(same_bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
  }
#elif BATCHNORM_VECTOR_BYTES == 32
  static Floats widen(Halves h) { return same_bits<Floats>(_mm256_cvtph_ps(same_bits<__m128i>(h))); }
  static Halves narrow(Floats v) {
    return same_bits<Halves>(_mm256_cvtps_ph(same_bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Floats widen(Halves h) {
    Words u = lengthen(h), magnitude = u & 0x7fff, sign = (u & 0x8000) << 16;
    // Subnormal numbers are multiples of 2^-24. No subnormal float is used on the way, for frameworks have processors
    // take those for 0.
    Words normal = (magnitude << 13) + 0x38000000;
    Words small = same_bits<Words>(__builtin_convertvector(same_bits<Integers>(magnitude), Floats) * 0x1p-24f);
    Words finite = choose(same_bits<Words>(magnitude < 0x400), small, normal);
    Words special = (magnitude << 13) | 0x7f800000;
    return same_bits<Floats>(choose(same_bits<Words>(magnitude >= 0x7c00), special, finite) | sign);
  }
  static Halves narrow(Floats v) {  // to nearest, ties to even; NaN stays one, what is too large becomes infinite
    Words u = same_bits<Words>(v), magnitude = u & 0x7fffffff, sign = (u & 0x80000000) >> 16;
    Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 lets the processor round a subnormal number at the right bit.
    Words small = same_bits<Words>(same_bits<Floats>(magnitude) + 0.5f) - 0x3f000000;
    Words large = choose(same_bits<Words>(magnitude > 0x7f800000), Words{} + 0x7e00, Words{} + 0x7c00);
    Words result = choose(same_bits<Words>(magnitude < 0x38800000), small, normal);
    return shorten(choose(same_bits<Words>(magnitude >= 0x47800000), large, result) | sign);
  }
#endif
};

using BFloat16 = Half<BFloat16Conversion>;
using Float16 = Half<Float16Conversion>;

// Formulas are written over lanes: those of a vector, or a single one for what is narrower than that.
template <class E>
struct VectorLanes {
  using V = typename E::Vector;
  static V load(const typename E::Stored* p) { return E::load(p); }
  static V values(const typename E::Value* p) { return load_bits<V>(p); }
  static V all(typename E::Value v) { return v - V{}; }  // subtracting zero keeps the sign of −0
  static void set_doubles(double* p, V v) { store_bits(p, __builtin_convertvector(v, Doubles)); }
  static void set_sum(double* p, V a, V b) {
    store_bits(p, __builtin_convertvector(a, Doubles) + __builtin_convertvector(b, Doubles));
  }
};
template <class E>
struct SingleLane {
  using V = typename E::Value;
  static V load(const typename E::Stored* p) { return E::load_single(p); }
  static V values(const typename E::Value* p) { return *p; }
  static V all(typename E::Value v) { return v; }
  static void set_doubles(double* p, V v) { *p = static_cast<double>(v); }
  static void set_sum(double* p, V a, V b) { *p = static_cast<double>(a) + static_cast<double>(b); }
};

template <class V>
double total(V v) {
  double parts[W];
  store_bits(parts, __builtin_convertvector(v, Doubles));
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// Keep the last n elements, and make the others 0, whatever they are.
template <class Mask, class V>
V keep_last(V v, int64_t n) {
  Mask lanes;
  for (int i = 0; i < W; i++) lanes[i] = i;
  return same_bits<V>(same_bits<Mask>(v) & (lanes >= W - static_cast<int>(n)));
}
Floats last_of(Floats v, int64_t n) { return keep_last<Integers>(v, n); }
Doubles last_of(Doubles v, int64_t n) { return keep_last<Longs>(v, n); }

// The first n elements of one, the others of another.
template <class Mask, class V>
V first_then(V v, int64_t n, V then) {
  Mask lanes;
  for (int i = 0; i < W; i++) lanes[i] = i;
  return lanes < static_cast<int>(n) ? v : then;
}
Floats first_of(Floats v, int64_t n, Floats then) { return first_then<Integers>(v, n, then); }
Doubles first_of(Doubles v, int64_t n, Doubles then) { return first_then<Longs>(v, n, then); }

}  // namespace
}  // namespace batchnorm
