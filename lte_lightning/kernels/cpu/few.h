// Few tokens per expert: every row of weights is read once, while the next row is prefetched.
#pragma once
#include "pairs.h"

namespace {

constexpr int64_t FEW_ROWS = 16, FEW_COLUMNS = 2048;  // rows and columns of a task

// What a row is multiplied by: bfloat16 as it is where the machine multiplies pairs, else float32.
template <class T> using Input = std::conditional_t<PAIRED<T>, T, float>;

// Rows that a token's input meets at a time. Bytes of the input would come too slowly for the machine's pairs.
template <class T> constexpr int FEW_DOTS = PAIRED<T> ? 4 : 1;

// out[t][r] = row r . x[t]. Prefetches the rows at next, because the processor does not foresee the jump to them.
template <int R, int TN, class T>
void dots(const T* rows, const T* next, int64_t D, const Input<T>* const* x, float* const* out) {
    constexpr int UNROLL = FEW_DOTS<T> > 1 ? 1 : W == 16 ? 4 : 2, STEP = PAIRED<T> ? 2 * W : W;
    vec acc[TN][R][UNROLL] = {};
    int64_t d = 0;
    auto add = [&](int u) {
        const int64_t at = d + u * STEP;
        auto pairs = [](const void* from) { return load(static_cast<const float*>(from)); };
        vec w[R];
        for (int r = 0; r < R; r++) w[r] = PAIRED<T> ? pairs(rows + r * D + at) : load_wide(rows + r * D + at);
        for (int t = 0; t < TN; t++) {
            const vec v = PAIRED<T> ? pairs(x[t] + at) : load_wide(x[t] + at);
            for (int r = 0; r < R; r++)
                acc[t][r][u] = PAIRED<T> ? multiply_add_pairs(acc[t][r][u], w[r], v) : acc[t][r][u] + w[r] * v;
        }
    };
    for (; d + UNROLL * STEP <= D; d += UNROLL * STEP) {
        for (int r = 0; r < R; r++)
            for (int b = 0; b < UNROLL * STEP * int(sizeof(T)); b += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(next + r * D + d) + b);
        for (int u = 0; u < UNROLL; u++) add(u);
    }
    for (; d + STEP <= D; d += STEP) add(0);
    for (int t = 0; t < TN; t++)
        for (int r = 0; r < R; r++) {
            for (int u = 1; u < UNROLL; u++) acc[t][r][0] += acc[t][r][u];
            float s = sum(acc[t][r][0]);
            for (int64_t k = d; k < D; k++) s += widen(rows[r * D + k]) * widen(x[t][k]);
            out[t][r] = s;
        }
}

// acc[t][c] += sum over R rows of h[t][r] * rows[r][c]. Prefetches next, too.
template <int R, int TN, class T>
void axpy(const T* rows, const T* next, int64_t D, int64_t columns, const float* const* h, float* const* acc) {
    constexpr int STEP = 64 / sizeof(T) > W ? 64 / sizeof(T) : W;  // at least a cache line
    int64_t c = 0;
    auto step = [&](int64_t c) {
        vec w[R];
        for (int r = 0; r < R; r++) w[r] = load_wide(rows + r * D + c);
        for (int t = 0; t < TN; t++) {
            vec a = load(acc[t] + c);
            for (int r = 0; r < R; r++) a += h[t][r] * w[r];
            store(acc[t] + c, a);
        }
    };
    for (; c + STEP <= columns; c += STEP) {
        for (int r = 0; r < R; r++) __builtin_prefetch(next + r * D + c);
        for (int i = 0; i < STEP; i += W) step(c + i);
    }
    for (; c + W <= columns; c += W) step(c);
    for (; c < columns; c++)
        for (int t = 0; t < TN; t++)
            for (int r = 0; r < R; r++) acc[t][c] += h[t][r] * widen(rows[r * D + c]);
}

template <class T> const Input<T>* inputs(const Ffn<T>& f) {
    if constexpr (std::is_same<T, Input<T>>::value) {
        return f.x;
    } else {
        float* const x = scratch<0, float>(f.N * f.D);
        for (int64_t i = 0; i < f.N * f.D; i++) x[i] = widen(f.x[i]);
        return x;
    }
}

template <class T> void few(const Ffn<T>& f) {
    const int64_t D = f.D, S = f.S, pairs = f.first[f.E];
    const Input<T>* const x = inputs(f);
    float* const h = scratch<1, float>(pairs * S);
    float* const gates = scratch<2, float>(f.gate ? pairs * S : 0);

    // A range is several slabs of rows. Within a range the next row is known.
    const int64_t per_expert = (S + FEW_ROWS - 1) / FEW_ROWS, slabs = int64_t(f.active.size()) * per_expert;
    const int64_t ranges = std::min(slabs, f.threads > 1 ? 4 * int64_t(f.threads) : 1);
    auto row_of = [&](int64_t slab) { return f.active[slab / per_expert] * S + slab % per_expert * FEW_ROWS; };
    auto hide = [&](int64_t range) {
        const int64_t end = (range + 1) * slabs / ranges;
        for (int64_t slab = range * slabs / ranges; slab < end; slab++) {
            const int64_t e = f.active[slab / per_expert], row = row_of(slab), s = row - e * S;
            const int64_t rows = std::min<int64_t>(FEW_ROWS, S - s), after = slab + 1 < end ? row_of(slab + 1) : row;
            at_a_time<FEW_DOTS<T>>(0, rows, [&](int64_t r, auto row_count) {
                constexpr int R = decltype(row_count)::value;
                int64_t next = r + R < rows ? row + r + R : after;
                at_a_time<4>(f.first[e], f.first[e + 1], [&](int64_t p, auto tokens) {
                    constexpr int TN = decltype(tokens)::value;
                    const Input<T>* xs[TN];
                    float *up[TN], *gate[TN];
                    for (int t = 0; t < TN; t++) {
                        xs[t] = x + f.token[p + t] * D;
                        up[t] = h + (p + t) * S + s + r;
                        gate[t] = gates + (p + t) * S + s + r;
                    }
                    if (f.gate) dots<R, TN>(f.gate + (row + r) * D, f.gate + next * D, D, xs, gate);
                    dots<R, TN>(f.up + (row + r) * D, f.up + next * D, D, xs, up);
                    next = row + r;  // already prefetched
                });
            });
            for (int64_t p = f.first[e]; p < f.first[e + 1]; p++) {
                alignas(64) float up[FEW_ROWS] = {}, gate[FEW_ROWS] = {};
                std::copy_n(h + p * S + s, rows, up);
                if (f.gate) std::copy_n(gates + p * S + s, rows, gate);
                f.finish(rows, row, up, gate);
                std::copy_n(up, rows, h + p * S + s);
            }
        }
    };

    const int64_t wide = std::min(FEW_COLUMNS, up_to((D + f.threads - 1) / f.threads, 64));
    auto project = [&](int64_t task) {
        const int64_t c = task * wide, columns = std::min(wide, D - c);
        float* const acc = scratch<3, float>(f.N * wide);
        for (int64_t n = 0; n < f.N; n++)
            for (int64_t k = 0; k < columns; k++) acc[n * wide + k] = f.bias(f.down_bias, c + k);
        for (size_t i = 0; i < f.active.size(); i++) {
            const int64_t e = f.active[i], row = e * S, after = i + 1 < f.active.size() ? f.active[i + 1] * S : row;
            auto add = [&](auto row_count, int64_t s, int64_t next) {
                constexpr int R = decltype(row_count)::value;
                at_a_time<4>(f.first[e], f.first[e + 1], [&](int64_t p, auto tokens) {
                    constexpr int TN = decltype(tokens)::value;
                    const float* hs[TN];
                    float* accs[TN];
                    for (int t = 0; t < TN; t++) {
                        hs[t] = h + (p + t) * S + s;
                        accs[t] = acc + f.token[p + t] * wide;
                    }
                    axpy<R, TN>(f.down + (row + s) * D + c, f.down + next * D + c, D, columns, hs, accs);
                    next = row + s;
                });
            };
            int64_t s = 0;
            for (; s + 4 <= S; s += 4) add(std::integral_constant<int, 4>(), s, s + 8 <= S ? row + s + 4 : after);
            for (; s < S; s++) add(std::integral_constant<int, 1>(), s, row + s);
        }
        for (int64_t n = 0; n < f.N; n++)
            for (int64_t k = 0; k < columns; k++) narrow(acc[n * wide + k], f.y[n * D + c + k]);
    };
    parallel(f.threads, ranges, hide, (D + wide - 1) / wide, project);
}

}  // namespace
