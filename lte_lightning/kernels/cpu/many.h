// Many tokens per expert: products in register tiles, over the tokens that run the expert.
#pragma once
#include "pairs.h"

namespace {

constexpr int NR = 2 * W;  // columns of a register tile
constexpr int MR = W == 16 ? 12 : W == 8 ? 6 : 4;  // rows of a register tile, as many as the registers hold
constexpr int64_t KC = 256, ROWS = 8 * MR;  // a panel fits the first-level cache, and its tokens fit the second
constexpr int64_t TOKENS = 1024, BLOCK = 64 * TOKENS;  // tokens and size of an output block in the second cache

// One step of a sum over k is four bytes: one float32, or two bfloat16 where the machine multiplies them.
template <class T> int64_t steps_of(int64_t k) { return PAIRED<T> ? (k + 1) / 2 : k; }

template <class T> inline float step_of(const T* from, int64_t k, int64_t stride, int64_t limit) {
    if (!PAIRED<T>) return widen(from[k * stride]);
    bf16 pair[2] = {};
    std::memcpy(pair, from + 2 * k * stride, 2);
    if (2 * k + 1 < limit) std::memcpy(pair + 1, from + (2 * k + 1) * stride, 2);
    float step;
    std::memcpy(&step, pair, 4);
    return step;
}

// W steps side by side: row k of W columns, or rows 2k and 2k + 1 of them as pairs.
template <class T> inline vec steps_at(const T* from, int64_t k, int64_t stride, int64_t limit) {
    if (!PAIRED<T>) return load_wide(from + k * stride);
    const ivec low = (ivec)load_wide(from + 2 * k * stride);
    const ivec high = 2 * k + 1 < limit ? (ivec)load_wide(from + (2 * k + 1) * stride) : ivec{};
    return (vec)(high | (low >> 16 & 0xffff));
}

// panel[k][0:W] = step k of each of W rows of D values. Zeros stand for missing rows.
template <class T>
void pack(const T* from, int64_t rows, int64_t stride, int64_t steps, int64_t D, float* panel) {
    int64_t k = 0;
#if defined(__GNUC__) && !defined(__clang__)
    // Transposes W by W blocks in registers: log2(W) times, pairs of rows swap the parts off the diagonal.
    for (; rows == W && (k + W) * (PAIRED<T> ? 2 : 1) <= D; k += W) {
        vec block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; r++)
            block[r] = PAIRED<T> ? load(reinterpret_cast<const float*>(from + r * stride) + k)
                                 : load_wide(from + r * stride + k);
#pragma GCC unroll 4
        for (int d = W / 2; d; d /= 2) {
            ivec first, second;
            for (int c = 0; c < W; c++) {
                first[c] = c & d ? W + c - d : c;
                second[c] = c & d ? W + c : c + d;
            }
#pragma GCC unroll 16
            for (int r = 0; r < W; r++)
                if (!(r & d)) {
                    const vec a = block[r], b = block[r + d];
                    block[r] = __builtin_shuffle(a, b, first);
                    block[r + d] = __builtin_shuffle(a, b, second);
                }
        }
#pragma GCC unroll 16
        for (int r = 0; r < W; r++) store(panel + (k + r) * NR, block[r]);
    }
#endif
    for (; k < steps; k++)
        for (int64_t r = 0; r < W; r++) panel[k * NR + r] = r < rows ? step_of(from + r * stride, k, 1, D) : 0.f;
}

// panels[columns / NR][steps][NR] = the steps down each column of a matrix. Zeros stand for missing columns.
template <class T>
void pack_columns(const T* from, int64_t rows, int64_t stride, int64_t columns, int64_t steps, float* panels) {
    for (int64_t k = 0; k < steps; k++)
        for (int64_t c = 0; c < up_to(columns, NR); c += W) {
            float* const to = panels + (c / NR * steps + k) * NR + c % NR;
            if (c + W <= columns) store(to, steps_at(from + c, k, stride, rows));
            else
                for (int64_t i = 0; i < W; i++) to[i] = c + i < columns ? step_of(from + c + i, k, stride, rows) : 0.f;
        }
}

// c[m][0:NR] += sum over steps of a[m][k] * b[k][0:NR]
template <bool Pairs, int M> void tile(int64_t steps, const float* const* a, const float* b, float* const* c) {
    vec acc[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        acc[m][0] = load(c[m]);
        acc[m][1] = load(c[m] + W);
    }
    for (int64_t k = 0; k < steps; k++) {
        const vec b0 = load(b + k * NR), b1 = load(b + k * NR + W);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            // Broadcast as an integer, because two bfloat16 may look like a signalling NaN.
            const vec broadcast = (vec)(ivec{} + reinterpret_cast<const int32_in_memory*>(a[m])[k]);
            if (Pairs) {
                acc[m][0] = multiply_add_pairs(acc[m][0], broadcast, b0);
                acc[m][1] = multiply_add_pairs(acc[m][1], broadcast, b1);
            } else {
                acc[m][0] += broadcast * b0;
                acc[m][1] += broadcast * b1;
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        store(c[m], acc[m][0]);
        store(c[m] + W, acc[m][1]);
    }
}
typedef void (*tile_of)(int64_t, const float* const*, const float*, float* const*);
template <bool Pairs, int... M> constexpr std::array<tile_of, sizeof...(M)> tiles(std::integer_sequence<int, M...>) {
    return {tile<Pairs, M + 1>...};
}

// The same for any number of rows: a and c return a row by its index.
template <class T, class A, class C> void product(int64_t rows, int64_t steps, const A& a, const float* b, const C& c) {
    static constexpr auto table = tiles<PAIRED<T>>(std::make_integer_sequence<int, MR>());
    for (int64_t r = 0; r < rows; r += MR) {
        const int m = int(std::min<int64_t>(MR, rows - r));
        const float* as[MR];
        float* cs[MR];
        for (int i = 0; i < m; i++) {
            as[i] = a(r + i);
            cs[i] = c(r + i);
        }
        table[m - 1](steps, as, b, cs);
    }
}

// Multiplies the rows of an expert's tokens by its weights: x has rows of steps. finish(p, sums) gets the S sums of pair p
// by the first weights, and those by the second behind ROWS * up_to(S, NR) others.
template <class T, class Finish>
void multiply_rows(const Ffn<T>& f, const float* x, int64_t e, int count, const T* const* weights, const Finish& finish) {
    const int64_t D = f.D, S = f.S, x_steps = steps_of<T>(D), wide = up_to(S, NR);
    float* const panels = scratch<2, float>(2 * x_steps * wide);
    for (int which = 0; which < count; which++)  // [wide / NR][x_steps][NR]
        for (int64_t s = 0; s < wide; s += W)
            pack(weights[which] + (e * S + s) * D, std::min<int64_t>(W, S - s), D, x_steps, D,
                 panels + which * x_steps * wide + s / NR * x_steps * NR + s % NR);
    float* const sums = scratch<3, float>(2 * ROWS * wide);
    for (int64_t p = f.first[e]; p < f.first[e + 1]; p += ROWS) {
        const int64_t rows = std::min(ROWS, f.first[e + 1] - p);
        std::fill_n(sums, 2 * ROWS * wide, 0.f);
        for (int which = 0; which < count; which++)
            for (int64_t s = 0; s < wide; s += NR)
                for (int64_t k = 0; k < x_steps; k += KC)
                    product<T>(
                        rows, std::min(KC, x_steps - k),
                        [&](int64_t r) { return x + f.token[p + r] * x_steps + k; },
                        panels + (which * wide + s) * x_steps + k * NR,
                        [&](int64_t r) { return sums + (which * ROWS + r) * wide + s; });
        for (int64_t r = 0; r < rows; r++) finish(p + r, sums + r * wide);
    }
}

// Adds the rows of each expert's weights, times the numbers of a pair, to the row of the pair's token. A task has some
// tokens and columns of the output. h has rows of steps.
template <class T> struct RowSums {
    const Ffn<T>& f;
    int count;
    const float* const* h;
    const T* const* weights;
    // Fewer tokens allow wider blocks, which read rows of weights in longer pieces.
    const int64_t fitting = std::min(BLOCK / std::max<int64_t>(1, std::min(f.N, TOKENS)), (f.D + f.threads - 1) / f.threads);
    const int64_t block_columns = up_to(std::min<int64_t>(fitting, 1024), NR);
    const int64_t blocks = (f.D + block_columns - 1) / block_columns;

    int64_t tasks() const { return (f.N + TOKENS - 1) / TOKENS * blocks; }

    void operator()(int64_t task) const {
        const int64_t D = f.D, S = f.S, h_steps = steps_of<T>(S);
        const int64_t n0 = task / blocks * TOKENS, n1 = std::min(f.N, n0 + TOKENS);
        const int64_t c0 = task % blocks * block_columns, columns = std::min(block_columns, D - c0);
        float* const out = scratch<2, float>(std::min(f.N, TOKENS) * block_columns);
        float* const panels = scratch<3, float>(h_steps * block_columns);
        for (int64_t n = n0; n < n1; n++)
            for (int64_t c = 0; c < block_columns; c++)
                out[(n - n0) * block_columns + c] = c < columns ? f.bias(f.down_bias, c0 + c) : 0.f;
        for (size_t i = 0; i < f.active.size(); i++) {
            const int64_t e = f.active[i], next = f.active[std::min(i + 1, f.active.size() - 1)];
            for (int64_t s = 0; s < S; s++)  // the processor does not foresee short pieces far apart
                for (int64_t b = 0; b < columns * int64_t(sizeof(T)); b += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(weights[0] + (next * S + s) * D + c0) + b);
            const auto token = f.token.begin();
            const int64_t p0 = std::lower_bound(token + f.first[e], token + f.first[e + 1], n0) - token;
            const int64_t p1 = std::lower_bound(token + p0, token + f.first[e + 1], n1) - token;
            for (int which = 0; which < count && p0 != p1; which++) {
                pack_columns(weights[which] + e * S * D + c0, S, D, columns, h_steps, panels);
                for (int64_t c = 0; c < columns; c += NR)
                    product<T>(
                        p1 - p0, h_steps, [&](int64_t r) { return h[which] + (p0 + r) * h_steps; },
                        panels + c * h_steps,
                        [&](int64_t r) { return out + (f.token[p0 + r] - n0) * block_columns + c; });
            }
        }
        for (int64_t n = n0; n < n1; n++)
            narrow_row(out + (n - n0) * block_columns, columns, f.y + n * D + c0);
    }
};

template <class T> void many(const Ffn<T>& f) {
    const int64_t D = f.D, S = f.S, pairs = f.first[f.E];
    const int64_t x_steps = steps_of<T>(D), h_steps = steps_of<T>(S), wide = up_to(S, NR);
    const float* x = reinterpret_cast<const float*>(f.x);
    if (!std::is_same<T, float>::value && (!PAIRED<T> || D % 2)) {
        float* const copy = scratch<0, float>(f.N * x_steps);
        auto convert = [&](int64_t n) {
            for (int64_t k = 0; k < x_steps; k++) copy[n * x_steps + k] = step_of(f.x + n * D, k, 1, D);
        };
        parallel(f.threads, f.N, convert, 0, convert);
        x = copy;
    }
    float* const h = scratch<1, float>(pairs * h_steps);
    const T* const weights[2] = {f.up, f.gate};
    auto hide = [&](int64_t task) {
        const int64_t e = f.active[task];
        multiply_rows(f, x, e, f.gate ? 2 : 1, weights, [&](int64_t p, float* up) {
            f.finish(S, e * S, up, up + ROWS * wide);
            float* const out = h + p * h_steps;
            if (PAIRED<T>) {
                if (S % 2) up[S] = 0.f;
                narrow_row(up, S + S % 2, reinterpret_cast<bf16*>(out));
            } else {
                std::copy_n(up, S, out);
            }
        });
    };
    const float* const hidden[1] = {h};
    const RowSums<T> project{f, 1, hidden, &f.down};
    parallel(f.threads, int64_t(f.active.size()), hide, project.tasks(), project);
}

}  // namespace
