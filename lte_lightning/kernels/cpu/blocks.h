// Matrices of 8 or 4 bits in blocks of 16 outputs by 32 inputs. The 32 weights of an output share a scale, and so do 32
// inputs.
//
// A block is read from front to back. At 8 bits it is [8][16 outputs][4 inputs] bytes. At 4 bits it is [4][16][4]
// bytes, where the low halves are the first four inputs of eight. Weights are unsigned and their zero is 128 or 8,
// because the machine multiplies unsigned by signed bytes: exactly, 64 products an instruction. Each input group is
// rounded to 8 bits, so a sum over a group is exact, too. Groups are added in float32, always in the same order. So an
// output depends neither on the threads nor on other tokens.
#pragma once
#include "pairs.h"

namespace {

constexpr int64_t LANES = 16, GROUP = 32;
constexpr int PARTS = LANES / W;  // vectors of a row of outputs

struct Group {
    int8_t q[GROUP];
    int32_t minus;  // the weights' zero times the sum of q, negated
    float scale;
};

// The stored matrix: [column parts][blocks of all outputs][groups of a column part] blocks. A part has `rows` outputs
// or `columns` inputs, and zeros fill it to whole blocks. Gate and up of an expert FFN have a part of outputs per
// expert, and down has a part of inputs, so an expert's weights lie in one piece.
struct Matrix {
    int64_t row_parts, rows, column_parts, columns;
    const uint8_t* blocks;
    const bf16* scale;  // [blocks][16 outputs]
    int64_t part_blocks() const { return (rows + LANES - 1) / LANES; }
    int64_t row_blocks() const { return row_parts * part_blocks(); }
    int64_t groups() const { return (columns + GROUP - 1) / GROUP; }
    int64_t block(int64_t row_block, int64_t part) const { return (part * row_blocks() + row_block) * groups(); }
};
template <int BITS> constexpr int64_t BLOCK_BYTES = LANES * GROUP * BITS / 8;

// Rounds up to 32 inputs to 8 bits. A group with NaN or infinity gets the scale NaN, so its products are NaN.
inline void round_group(const float* x, int64_t count, int32_t zero, Group& g) {
    alignas(64) float v[GROUP] = {};
    std::copy_n(x, count, v);
    float largest = 0.f, odd = 0.f;
    for (float f : v) {
        const float a = std::fabs(f);
        largest = a > largest ? a : largest;
        odd += f * 0.f;  // NaN for infinity, too
    }
    const bool empty = largest < 1e-30f;
    const float up = empty || odd != 0.f ? 0.f : 127.f / largest;
    int32_t total = 0;
    for (int i = 0; i < GROUP; i++) {
        const int32_t q = odd != 0.f ? 0 : int32_t(bits(v[i] * up + 12582912.f) - bits(12582912.f));  // to nearest
        g.q[i] = int8_t(q);
        total += q;
    }
    g.minus = -zero * total;
    g.scale = odd != 0.f ? bits(uint32_t(0x7fc00000)) : empty ? 0.f : largest / 127.f;
}

inline ivec load_bytes(const uint8_t* p) {
    ivec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// sum[lane] += four unsigned bytes of w by the four signed ones of x
inline ivec multiply_add_bytes(ivec sum, ivec w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    const __m512i b = _mm512_set1_epi32(x), v = (__m512i)w;
    const __m512i even = _mm512_madd_epi16(
        _mm512_and_si512(v, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    const __m512i other = _mm512_madd_epi16(_mm512_srli_epi16(v, 8), _mm512_srai_epi16(b, 8));
    return sum + (ivec)even + (ivec)other;
#elif defined(__AVX2__)
    const __m256i b = _mm256_set1_epi32(x), v = (__m256i)w;
    const __m256i even = _mm256_madd_epi16(
        _mm256_and_si256(v, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i other = _mm256_madd_epi16(_mm256_srli_epi16(v, 8), _mm256_srai_epi16(b, 8));
    return sum + (ivec)even + (ivec)other;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (ivec)vusdotq_s32((int32x4_t)sum, (uint8x16_t)w, (int8x16_t)vdupq_n_s32(x));
#elif defined(__ARM_FEATURE_DOTPROD)  // multiplies signed bytes alone: w - 128, and 128 added back
    const int8x16_t b = (int8x16_t)vdupq_n_s32(x), lower = veorq_s8((int8x16_t)w, vdupq_n_s8(-128));
    return (ivec)vdotq_s32((int32x4_t)sum, lower, b) - (ivec)vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), b);
#else
    for (int i = 0; i < 4; i++) sum += (w >> 8 * i & 255) * int32_t(int8_t(uint32_t(x) >> 8 * i));
    return sum;
#endif
}

// acc[t] += `groups` blocks of weights times as many groups of each token's input. Prefetches the blocks 4 KB ahead, or
// at next.
template <int BITS, int TN>
void add_blocks(const uint8_t* w, const bf16* scale, int64_t groups, const uint8_t* next, const Group* const* x,
                vec (*acc)[PARTS]) {
    constexpr int64_t SIZE = BLOCK_BYTES<BITS>, FAR = 4096 / SIZE;
    for (int64_t g = 0; g < groups; g++, w += SIZE) {
        if (next) {
            const uint8_t* const ahead = g + FAR < groups ? w + FAR * SIZE : next + (g + FAR - groups) * SIZE;
            for (int64_t b = 0; b < SIZE; b += 64) __builtin_prefetch(ahead + b);
        }
        ivec sum[TN][PARTS];
        for (int t = 0; t < TN; t++)
            for (int p = 0; p < PARTS; p++) sum[t][p] = ivec{} + x[t][g].minus;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            for (int p = 0; p < PARTS; p++) {
                ivec bytes = load_bytes(w + (BITS == 8 ? i : i / 2) * 4 * LANES + p * 4 * W);
                if (BITS == 4) bytes = (i % 2 ? bytes >> 4 : bytes) & 0x0f0f0f0f;
                for (int t = 0; t < TN; t++) {
                    int32_t four;
                    std::memcpy(&four, x[t][g].q + 4 * i, 4);
                    sum[t][p] = multiply_add_bytes(sum[t][p], bytes, four);
                }
            }
        for (int p = 0; p < PARTS; p++) {
            const vec factor = load_wide(scale + g * LANES + p * W);
            for (int t = 0; t < TN; t++)
                acc[t][p] += __builtin_convertvector(sum[t][p], vec) * (factor * x[t][g].scale);
        }
    }
}

// Calls body with 8, 4, 2 or 1 of the numbers at a time.
template <class Body> void at_a_time(int64_t begin, int64_t end, const Body& body) {
    for (; begin + 8 <= end; begin += 8) body(begin, std::integral_constant<int, 8>());
    if (begin + 4 <= end) body(begin, std::integral_constant<int, 4>()), begin += 4;
    if (begin + 2 <= end) body(begin, std::integral_constant<int, 2>()), begin += 2;
    if (begin < end) body(begin, std::integral_constant<int, 1>());
}

// Rounds a token's input: [column parts][groups].
template <int BITS, class T> void round_input(const T* x, const Matrix& m, Group* out) {
    alignas(64) float v[GROUP];
    for (int64_t part = 0; part < m.column_parts; part++)
        for (int64_t c = 0; c < m.columns; c += GROUP) {
            const int64_t count = std::min(GROUP, m.columns - c);
            for (int64_t i = 0; i < count; i++) v[i] = widen(x[part * m.columns + c + i]);
            round_group(v, count, BITS == 8 ? 128 : 8, *out++);
        }
}

// The same for N tokens.
template <int BITS, class T> Group* round_inputs(const T* x, int64_t N, const Matrix& m, int threads) {
    const int64_t all_groups = m.column_parts * m.groups();
    Group* const out = scratch<0, Group>(N * all_groups);
    auto round = [&](int64_t n) { round_input<BITS>(x + n * m.column_parts * m.columns, m, out + n * all_groups); };
    parallel(N > 4 ? threads : 1, N, round, 0, round);
    return out;
}

}  // namespace
