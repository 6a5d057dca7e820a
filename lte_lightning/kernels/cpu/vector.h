// The base of all kernels here: vectors of the machine's width, element types, activations, threads.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef int32_t int32_in_memory __attribute__((aligned(2), may_alias));
// Rows of bfloat16 may begin at any multiple of two bytes. Rows of an odd length do.
typedef float vec_in_memory __attribute__((vector_size(4 * W), aligned(2), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec_in_memory*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_in_memory*>(p) = v; }
inline vec all(float x) { return vec{} + x; }

// The element types of weights and activations: float32, bfloat16 and float16.
inline float bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

struct bf16 { uint16_t u; };
struct f16 { uint16_t u; };
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits(uint32_t(x.u) << 16); }
inline float widen(f16 x) {
    const uint32_t rest = x.u & 0x7fff;
    const float f = rest >= 0x7c00 ? bits((rest << 13) | 0x7f800000) : bits(rest << 13) * 0x1p112f;
    return x.u & 0x8000 ? -f : f;
}
inline void narrow(float f, float& out) { out = f; }
inline void narrow(float f, bf16& out) {
    const uint32_t u = bits(f);
    out.u = f != f ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(float f, f16& out) {
    const uint32_t u = bits(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    uint32_t h;
    if (rest > 0x7f800000) h = 0x7e00;
    else if (rest >= 0x477ff000) h = 0x7c00;  // 65520 and above round to infinity
    else if (rest < 0x38800000) h = bits(bits(rest) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
    else h = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    out.u = uint16_t(sign | h);
}
template <class T> inline vec load_wide(const T* p) {
    vec v;
    for (int i = 0; i < W; i++) v[i] = widen(p[i]);
    return v;
}
template <> inline vec load_wide(const float* p) { return load(p); }
#if defined(__AVX512F__)
template <> inline vec load_wide(const bf16* p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
template <> inline vec load_wide(const f16* p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
template <> inline vec load_wide(const bf16* p) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
template <> inline vec load_wide(const f16* p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(__ARM_NEON)
template <> inline vec load_wide(const bf16* p) { return (vec)vshlq_n_u32(vmovl_u16(vld1_u16(&p->u)), 16); }
template <> inline vec load_wide(const f16* p) { return (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->u))); }
#endif

// The other way, for W numbers.
typedef uint16_t halves_in_memory __attribute__((vector_size(2 * W), aligned(2), may_alias));
template <class T> inline void store_narrow(T* p, vec v) {
    for (int i = 0; i < W; i++) narrow(v[i], p[i]);
}
template <> inline void store_narrow(float* p, vec v) { store(p, v); }
template <> inline void store_narrow(bf16* p, vec v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));  // numbers below 1e-38 become 0
#else
    const ivec u = (ivec)v, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = ivec{} + 0x7fc0;
    *reinterpret_cast<halves_in_memory*>(p) = __builtin_convertvector(v != v ? nan : rounded, halves_in_memory);
#endif
}
template <class T> inline void narrow_row(const float* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store_narrow(to + i, load(from + i));
    for (; i < count; i++) narrow(from[i], to[i]);
}

template <class V, class F> inline auto fold(V v, const F& join) {  // halves onto halves
    decltype(v[0] + v[0]) s[W];
    std::memcpy(s, &v, sizeof s);
#pragma GCC unroll 4
    for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) s[i] = join(s[i], s[i + half]);
    return s[0];
}
inline float sum(vec v) { return fold(v, [](float a, float b) { return a + b; }); }
#if defined(__AVX512F__)
inline int32_t sum(ivec v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline int32_t max(ivec v) { return _mm512_reduce_max_epi32((__m512i)v); }
inline float max(vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline int32_t sum(ivec v) { return fold(v, [](int32_t a, int32_t b) { return a + b; }); }
inline int32_t max(ivec v) { return fold(v, [](int32_t a, int32_t b) { return a > b ? a : b; }); }
inline float max(vec v) { return fold(v, [](float a, float b) { return a > b ? a : b; }); }
#endif

// acc += the products of pairs of bfloat16, where the machine multiplies them.
#if defined(__AVX512BF16__)
template <class T> constexpr bool PAIRED = std::is_same<T, bf16>::value;
inline vec multiply_add_pairs(vec acc, vec a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
template <class T> constexpr bool PAIRED = false;
inline vec multiply_add_pairs(vec acc, vec, vec) { return acc; }
#endif

// e to the power of x, for x from -87 to 88. DEGREE 7 is within 1e-6 of the exact value, and 5 within 4e-6.
template <int DEGREE> inline vec exponential_within(vec x) {
    const vec magic = all(12582912.f);  // adding 1.5 * 2^23 rounds to an integer, found in the low bits
    const vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    constexpr float c[] = {1.f, 1.f, 0.5f, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
    vec p = all(c[DEGREE]);
#pragma GCC unroll 8
    for (int i = DEGREE - 1; i >= 0; i--) p = p * r + c[i];
    return p * (vec)(((ivec)shifted << 23) + (127 << 23));  // the shift drops the bits of magic
}

// Activations, a vector at a time, within 1e-6 of the exact values.
inline vec exponential(vec x) {
    x = x < -87.f ? all(-87.f) : x;
    return exponential_within<7>(x > 88.f ? all(88.f) : x);
}
inline vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }
inline vec erf_of(vec x) {  // Abramowitz and Stegun 7.1.26
    const vec a = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * a);
    vec p = all(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    const vec y = 1.f - p * t * exponential(-a * a);
    return x < 0.f ? -y : y;
}
enum Activation { RELU, GELU, GELU_TANH, SILU };
inline vec activate(int kind, vec x) {
    switch (kind) {
        case RELU: return x < 0.f ? all(0.f) : x;  // NaN stays
        case GELU: return 0.5f * x * (1.f + erf_of(x * 0.70710678f));
        case GELU_TANH: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        default: return x * sigmoid(x);
    }
}

// Calls ready until it returns true. It begins without system calls, because a decoder's step waits hundreds of times
// for a microsecond.
template <class Ready> void wait_until(const Ready& ready) {
    for (int i = 0; !ready(); i++) {
        if (i > 4000) std::this_thread::yield();  // other threads may be waiting for this core
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

// The threads are torch's own OpenMP team where one is loaded: two teams on the same cores would fight.
typedef void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned);
#ifdef LTE_TEAM  // that of another program, see export/extension.cpp
void LTE_TEAM(void (*)(void*), void*, unsigned, unsigned);
#endif

// Runs all tasks of a first kind, then those of a second kind, in one region. No thread waits in between for a thread
// that has not started, which can take many milliseconds on a busy machine.
template <class First, class Second>
void parallel(int threads, int64_t firsts, const First& first, int64_t seconds, const Second& second) {
    struct Shared {
        std::atomic<int64_t> next_first, done, next_second;
        std::atomic<bool> failed;
        int64_t firsts, seconds;
        const First* first;
        const Second* second;
    } shared{{0}, {0}, {0}, {false}, firsts, seconds, &first, &second};
    auto work = [](void* p) {
        Shared& s = *static_cast<Shared*>(p);
        // an exception that left a thread would end the process
        auto run = [&s](const auto& task, int64_t i) {
            try {
                task(i);
            } catch (const std::bad_alloc&) {
                s.failed = true;
            }
        };
        for (int64_t i; (i = s.next_first.fetch_add(1)) < s.firsts; s.done.fetch_add(1)) run(*s.first, i);
        wait_until([&s] { return s.done.load() >= s.firsts; });
        for (int64_t i; (i = s.next_second.fetch_add(1)) < s.seconds;) run(*s.second, i);
    };
#ifdef LTE_TEAM
    const gomp_parallel team = LTE_TEAM;
#else
    static const gomp_parallel team = reinterpret_cast<gomp_parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
    threads = int(std::min<int64_t>(threads, std::max(firsts, seconds)));
    if (team && threads > 1) {
        team(work, &shared, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int t = 1; t < threads; t++) others.emplace_back(work, &shared);
        work(&shared);
        for (auto& other : others) other.join();
    }
    if (shared.failed) throw std::bad_alloc();
}

// A buffer that each thread keeps, one per Slot: fresh pages would cost more than the work.
template <int Slot, class T> T* scratch(int64_t count) {
    thread_local std::vector<char> buffer;
    const size_t bytes = size_t(count) * sizeof(T) + 64;
    if (buffer.size() < bytes) buffer = std::vector<char>(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t(63));
}

}  // namespace
