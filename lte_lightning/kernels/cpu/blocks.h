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

#define NOT_INLINED __attribute__((noinline))  // large, and called from several places: compiled once

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

typedef int8_t bytes_in_memory __attribute__((vector_size(W), aligned(1), may_alias));

// Rounds 32 inputs to 8 bits. A group with NaN or infinity gets the scale NaN, so its products are NaN.
inline void round_group(const vec (&v)[GROUP / W], int32_t zero, Group& g) {
    ivec largest = {};  // without signs, floats are in the order of their bits, and infinity and NaN come last
#pragma GCC unroll 8
    for (const vec& x : v) {
        const ivec a = (ivec)x & 0x7fffffff;
        largest = a > largest ? a : largest;
    }
    const uint32_t most_bits = uint32_t(max(largest));
    const float most = bits(most_bits);
    const bool is_odd = most_bits >= 0x7f800000, empty = most < 1e-30f;
    const float up = empty || is_odd ? 0.f : 127.f / most;
    ivec total = {};
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / W; i++) {
        const vec magic = all(12582912.f);  // adding 1.5 * 2^23 rounds to the nearest integer, in the low bits
        ivec q = (ivec)(v[i] * up + magic) - (ivec)magic;
        if (is_odd) q = ivec{};
        *reinterpret_cast<bytes_in_memory*>(g.q + i * W) = __builtin_convertvector(q, bytes_in_memory);
        total += q;
    }
    g.minus = -zero * sum(total);
    g.scale = is_odd ? bits(uint32_t(0x7fc00000)) : empty ? 0.f : most / 127.f;
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

// A tile of sums that stays in registers: tokens by blocks of outputs. Each byte of an input is multiplied by both
// blocks, and each block by all tokens, so that loads do not hold up the products.
constexpr int TILE_TOKENS = W == 16 ? 6 : 8, TILE_BLOCKS = W == 16 ? 2 : 1;

// to[t][0:16 RN] += `groups` blocks of weights times as many groups of each token's input. Blocks of the next 16
// outputs are `groups` blocks further. With RN = 1 it prefetches the blocks 4 KB ahead, or at next.
template <int BITS, int TN, int RN>
NOT_INLINED void add_blocks(const uint8_t* w, const bf16* scale, int64_t groups, const uint8_t* next,
                            const Group* const* x, float* const* to) {
    constexpr int64_t SIZE = BLOCK_BYTES<BITS>, FAR = 4096 / SIZE;
    const Group* xs[TN];
    vec sums[TN][RN][PARTS];
#pragma GCC unroll 8
    for (int t = 0; t < TN; t++) {
        xs[t] = x[t];
#pragma GCC unroll 4
        for (int i = 0; i < RN * PARTS; i++) sums[t][i / PARTS][i % PARTS] = load(to[t] + i * W);
    }
    for (int64_t g = 0; g < groups; g++, w += SIZE) {
        if (RN == 1 && next) {
            const uint8_t* const ahead = g + FAR < groups ? w + FAR * SIZE : next + (g + FAR - groups) * SIZE;
            for (int64_t b = 0; b < SIZE; b += 64) __builtin_prefetch(ahead + b);
        }
        ivec exact[TN][RN][PARTS];
#pragma GCC unroll 8
        for (int t = 0; t < TN; t++)
#pragma GCC unroll 4
            for (int i = 0; i < RN * PARTS; i++) exact[t][i / PARTS][i % PARTS] = ivec{} + xs[t][g].minus;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                ivec bytes[RN];
#pragma GCC unroll 2
                for (int r = 0; r < RN; r++) {
                    bytes[r] = load_bytes(w + r * groups * SIZE + (BITS == 8 ? i : i / 2) * 4 * LANES + p * 4 * W);
                    if (BITS == 4) bytes[r] = (i % 2 ? bytes[r] >> 4 : bytes[r]) & 0x0f0f0f0f;
                }
#pragma GCC unroll 8
                for (int t = 0; t < TN; t++) {
                    int32_t four;
                    std::memcpy(&four, xs[t][g].q + 4 * i, 4);
#pragma GCC unroll 2
                    for (int r = 0; r < RN; r++) exact[t][r][p] = multiply_add_bytes(exact[t][r][p], bytes[r], four);
                }
            }
#pragma GCC unroll 8
        for (int i = 0; i < RN * PARTS; i++) {
            const int r = i / PARTS, p = i % PARTS;
            const vec factor = load_wide(scale + (r * groups + g) * LANES + p * W);
#pragma GCC unroll 8
            for (int t = 0; t < TN; t++)
                sums[t][r][p] += __builtin_convertvector(exact[t][r][p], vec) * (factor * xs[t][g].scale);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TN; t++)
#pragma GCC unroll 4
        for (int i = 0; i < RN * PARTS; i++) store(to[t] + i * W, sums[t][i / PARTS][i % PARTS]);
}

// Calls body(token, block, tokens at once, blocks at once) for all tokens and blocks. Few tokens: each block comes from
// memory once, and meets all tokens. Many: a stripe of blocks stays in the second-level cache, and a tile's tokens meet
// all of it, so that their outputs are written in order.
template <class Body>
void in_tiles(int64_t n0, int64_t n1, int64_t b0, int64_t b1, int64_t block_bytes, const Body& body) {
    if (TILE_BLOCKS == 1 || n1 - n0 < TILE_TOKENS) {
        for (; b0 < b1; b0++) at_a_time<8>(n0, n1, [&](int64_t n, auto tokens) { body(n, b0, tokens, constant<1>()); });
        return;
    }
    const int64_t stripe = std::max<int64_t>(1, (int64_t(320) << 10) / block_bytes / TILE_BLOCKS) * TILE_BLOCKS;
    for (; b0 < b1; b0 += stripe)
        at_a_time<TILE_TOKENS>(n0, n1, [&](int64_t n, auto tokens) {
            const int64_t end = std::min(b1, b0 + stripe);
            int64_t b = b0;
            for (; b + TILE_BLOCKS <= end; b += TILE_BLOCKS) body(n, b, tokens, constant<TILE_BLOCKS>());
            if (b < end) body(n, b, tokens, constant<1>());
        });
}

// Writes up to 16 outputs of a token, with the bias if there is one.
template <class T> void write_lanes(const float* sums, const T* bias, int64_t count, T* y) {
    if (count == LANES)
        for (int i = 0; i < LANES; i += W) store_narrow(y + i, load(sums + i) + (bias ? load_wide(bias + i) : vec{}));
    else
        for (int64_t i = 0; i < count; i++) narrow(sums[i] + (bias ? widen(bias[i]) : 0.f), y[i]);
}

// Loads 32 values, or zeros in the place of those that are missing.
template <class T> void load_group(const T* from, int64_t count, vec (&v)[GROUP / W]) {
    T padded[GROUP] = {};
    if (count < GROUP) from = std::copy_n(from, count, padded) - count;
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / W; i++) v[i] = load_wide(from + i * W);
}

// Rounds a token's input: [column parts][groups].
template <int BITS, class T> void round_input(const T* x, const Matrix& m, Group* out) {
    for (int64_t part = 0; part < m.column_parts; part++)
        for (int64_t c = 0; c < m.columns; c += GROUP) {
            vec v[GROUP / W];
            load_group(x + part * m.columns + c, m.columns - c, v);
            round_group(v, BITS == 8 ? 128 : 8, *out++);
        }
}

// The same for N tokens. Without x, the groups are those of the last call of this Slot in this thread.
template <int BITS, int Slot, class T> Group* round_inputs(const T* x, int64_t N, const Matrix& m, int threads) {
    const int64_t all_groups = m.column_parts * m.groups();
    Group* const out = scratch<Slot, Group>(N * all_groups);
    if (!x) return out;
    auto round = [&](int64_t n) { round_input<BITS>(x + n * m.column_parts * m.columns, m, out + n * all_groups); };
    parallel(N > 4 ? threads : 1, N, round, 0, round);
    return out;
}

}  // namespace
