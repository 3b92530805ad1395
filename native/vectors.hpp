// Vectors of floats, and the types that arrays are stored in. Like every header that isa.cpp includes besides the
// interfaces, this one is compiled once for each instruction set. So none may use an inline function of the standard
// library, for a linker keeps one of several copies, whatever it was compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

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
using Part = __m512i;
void stream_part(Part* p, Part v) { _mm512_stream_si512(p, v); }
void stream_part(__m256i* p, __m256i v) { _mm256_stream_si256(p, v); }
#elif BATCHNORM_VECTOR_BYTES == 32
using Part = __m256i;
void stream_part(Part* p, Part v) { _mm256_stream_si256(p, v); }
void stream_part(__m128i* p, __m128i v) { _mm_stream_si128(p, v); }
#else
using Part = __m128i;
void stream_part(Part* p, Part v) { _mm_stream_si128(p, v); }
#endif
template <class V, class P>
void stream_bits(P* p, V v) {
  if constexpr (sizeof v >= sizeof(Part)) {
    Part parts[sizeof v / sizeof(Part)];
    std::memcpy(parts, &v, sizeof v);
    for (size_t i = 0; i < sizeof v / sizeof(Part); i++) stream_part(reinterpret_cast<Part*>(p) + i, parts[i]);
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

// How a stored type is loaded and stored: Value is what arithmetic is in, Vector holds W of them.
template <class T, class V>
struct Whole {
  using Stored = T;
  using Value = T;
  using Vector = V;
  static Vector load(const Stored* p) { return load_bits<Vector>(p); }
  static void store(Stored* p, Vector v) { store_bits(p, v); }
  static void stream(Stored* p, Vector v) { stream_bits(p, v); }
  static Value one(const Stored* p) { return load_bits<Value>(p); }
  static void put(Stored* p, Value v) { store_bits(p, v); }
};
using Float32 = Whole<float, Floats>;
using Float64 = Whole<double, Doubles>;

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
  __m256i wide = same_bits<__m256i>(u);
  return same_bits<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08)));
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
  static Value one(const Stored* p) { return Conversion::widen(Halves{} + load_bits<Stored>(p))[0]; }
  static void put(Stored* p, Value v) {
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

}  // namespace
}  // namespace batchnorm
