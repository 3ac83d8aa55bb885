// A vector of floats of the instruction set for which this file is compiled, and the functions that the kernels use.
//
// They are written in vector extensions of GCC and Clang: a kernel is written once and compiled for SSE2 or NEON, AVX2
// and AVX-512. TRACE_FAST_ISA names the instruction set. Everything here has internal linkage; see common.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace trace_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int64_t kLanes = kBytes / sizeof(float);

typedef float vec __attribute__((vector_size(kBytes)));
typedef int32_t ivec __attribute__((vector_size(kBytes)));
typedef uint32_t uvec __attribute__((vector_size(kBytes)));

// the smallest normal float: probabilities are clamped to it from below
constexpr float kTiny = 0x1p-126f;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.69314718055994531;

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

inline vec splat(float value) { return value - vec{}; }

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

// Keeps a value that is used twice in its register: GCC may otherwise load it for each use, as an operand in memory.
inline void keep(vec& value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// Loads the first count lanes from memory and sets the others to fill.
inline vec load_first(const float* from, int64_t count, float fill) {
  vec value = splat(fill);
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

// Returns the larger number of each pair; a NaN in b is returned.
inline vec max(vec a, vec b) { return a > b ? a : b; }

inline float sum(vec value) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) value[i] += value[i + half];
  return value[0];
}

inline float max(vec value) {
  float top = value[0];
  for (int64_t i = 1; i < kLanes; ++i) top = value[i] > top ? value[i] : top;
  return top;
}

// Returns log2 of max(x, kTiny) for finite x, to about one unit in the last place; NaN gives NaN.
inline vec log2(vec x) {
  x = max(splat(kTiny), x);
  // x = 2^exponent * mantissa with the mantissa in [2/3, 4/3), where log2 keeps its relative precision around 1
  const ivec bits = (ivec)x;
  const ivec exponent = (bits - 0x3f2aaaab) & ~0x7fffff;
  const vec f = (vec)(bits - exponent) - 1.0f;
  // minimax for log2(1 + f) / f on [-1/3, 1/3], relative error 8e-9
  vec p = splat(0.2120572949f);
  p = p * f - 0.2259603563f;
  p = p * f + 0.1995488543f;
  p = p * f - 0.2359893037f;
  p = p * f + 0.2888904279f;
  p = p * f - 0.3608408340f;
  p = p * f + 0.4808908839f;
  p = p * f - 0.7213456052f;
  p = p * f + 1.442695081f;
  // the bit pattern of a NaN would be taken for a number: x * 0 propagates the NaN
  return p * f + (__builtin_convertvector(exponent >> 23, vec) + x * 0.0f);
}

// Returns 2^x for x <= 0, to about one unit in the last place; results below 2^-126 are 0, NaN gives NaN.
inline vec exp2(vec x) {
  // after 1.5 * 2^23 is added, the low bits hold the nearest integer
  const vec shifted = x + 0x1.8p23f;
  const vec f = x - (shifted - 0x1.8p23f);
  const vec scale = (vec)(((uvec)shifted << 23) + 0x3f800000u);
  // minimax for (2^f - 1) / f on [-1/2, 1/2], relative error 3e-9
  vec p = splat(0.0001536251158f);
  p = p * f + 0.001339702945f;
  p = p * f + 0.009618407391f;
  p = p * f + 0.05550339038f;
  p = p * f + 0.2402264819f;
  p = p * f + 0.6931471979f;
  p = p * f + 1.0f;
  return x < -126.0f ? vec{} : p * scale;
}

}  // namespace
}  // namespace trace_fast
