// The products that training with selected experts consists of. A pair is a token and an expert that it runs.
// Operands are float32, or bfloat16 in even rows where the machine multiplies pairs of them; see `takes`.
#pragma once
#include "many.h"

namespace {

template <class T> bool takes(int64_t D, int64_t S) {
    return std::is_same<T, float>::value || (PAIRED<T> && D % 2 == 0 && S % 2 == 0);
}

template <class T> const float* as_steps(const T* rows) { return reinterpret_cast<const float*>(rows); }

// out[p] = the S rows of the expert's weights . the token's row of f.x, plus the bias; for one or two weights.
template <class T> void rows_to_pairs(const Ffn<T>& f, int count, T* const* out) {
    const T* const weights[2] = {f.up, f.gate};
    const T* const biases[2] = {f.up_bias, f.gate_bias};
    auto task = [&](int64_t i) {
        const int64_t e = f.active[i], S = f.S;
        multiply_rows(f, as_steps(f.x), e, count, weights, [&](int64_t p, float* sums) {
            for (int which = 0; which < count; which++) {
                float* const row = sums + which * ROWS * up_to(S, NR);
                for (int64_t s = 0; biases[which] && s < S; s++) row[s] += widen(biases[which][e * S + s]);
                narrow_row(row, S, out[which] + p * S);
            }
        });
    };
    parallel(f.threads, int64_t(f.active.size()), task, 0, task);
}

// f.y[token] = the sum over its pairs, and over one or two weights, of numbers[p] . the expert's rows.
template <class T> void pairs_to_rows(const Ffn<T>& f, int count, const T* const* numbers) {
    const float* const h[2] = {as_steps(numbers[0]), as_steps(numbers[1])};
    const T* const weights[2] = {f.up, f.gate};
    const RowSums<T> sums{f, count, h, weights};
    parallel(f.threads, sums.tasks(), sums, 0, sums);
}

// to[0:NR] = a step of the sum over pairs: columns c to c + held of one token's row, or of two.
template <class T>
void step_of_tokens(const Ffn<T>& f, int64_t p, int64_t k, int64_t end, int64_t c, int64_t held, float* to) {
    constexpr int EACH = PAIRED<T> ? 2 : 1;
    T rows[EACH][NR] = {};
    const T* from[EACH];
    for (int i = 0; i < EACH; i++) {
        const int64_t pair = p + EACH * k + i;
        from[i] = pair < end ? f.x + f.token[pair] * f.D + c : rows[i];
        for (int b = 0; b < NR * int(sizeof(T)); b += 64)  // of the next columns: rows far apart are not foreseen
            __builtin_prefetch(reinterpret_cast<const char*>(from[i] + NR) + b);
        if (pair < end && held < NR) from[i] = std::copy_n(from[i], held, rows[i]) - held;
    }
    for (int64_t i = 0; i < NR; i += W) {
        if constexpr (EACH == 1) {
            store(to + i, load_wide(from[0] + i));
        } else {
            const ivec low = (ivec)load_wide(from[0] + i), high = (ivec)load_wide(from[1] + i);
            store(to + i, (vec)(high | (low >> 16 & 0xffff)));
        }
    }
}

constexpr int64_t PAIRS = 192;  // at a time: their rows of x fit the second-level cache

// out[e][s] = the sum over the expert's pairs of numbers[p][s] * the token's row of f.x; for one or two sets of numbers.
template <class T> void pairs_to_weights(const Ffn<T>& f, int count, const T* const* numbers, T* const* out) {
    const int64_t D = f.D, S = f.S, wide = up_to(D, NR), all_steps = steps_of<T>(PAIRS);
    auto task = [&](int64_t e) {
        float* const sums = scratch<2, float>(count * S * wide);
        float* const columns = scratch<3, float>(count * S * all_steps + all_steps * NR);
        float* const panel = columns + count * S * all_steps;
        std::fill_n(sums, count * S * wide, 0.f);
        for (int64_t p = f.first[e]; p < f.first[e + 1]; p += PAIRS) {
            const int64_t rows = std::min(PAIRS, f.first[e + 1] - p), steps = steps_of<T>(rows);
            for (int which = 0; which < count; which++)
                for (int64_t k = 0; k < steps; k++)
                    for (int64_t s = 0; s < S; s++)
                        columns[(which * S + s) * all_steps + k] = step_of(numbers[which] + p * S + s, k, S, rows);
            for (int64_t c = 0; c < D; c += NR) {
                const int64_t held = std::min<int64_t>(NR, D - c);
                for (int64_t k = 0; k < steps; k++) step_of_tokens(f, p, k, p + rows, c, held, panel + k * NR);
                for (int which = 0; which < count; which++)
                    product<T>(
                        S, steps, [&](int64_t s) { return columns + (which * S + s) * all_steps; }, panel,
                        [&](int64_t s) { return sums + (which * S + s) * wide + c; });
            }
        }
        for (int which = 0; which < count; which++)
            for (int64_t s = 0; s < S; s++)
                narrow_row(sums + (which * S + s) * wide, D, out[which] + (e * S + s) * D);
    };
    parallel(f.threads, f.E, task, 0, task);
}

}  // namespace
