// Attention of an encoder: softmax(q k' scale) v for each head, where a mask may hide keys. torch's own kernel takes 2
// to 3 times as long for the short rows that encoders read, because it multiplies small blocks one by one.
#pragma once
#include "many.h"

namespace {

// Where a tensor [B, H, T, D] has its parts. The values of a head lie side by side.
struct Strides {
    int64_t batch, head, row;
};

template <class T> struct Attention {
    int64_t B, H, Q, K, D;  // batch, heads, queries, keys, width of a head
    Strides to_q, to_k, to_v, to_mask;  // the mask is the same for all heads, and to_mask.head is its step per key
    float scale;
    const T *q, *k, *v;
    const uint8_t* mask;  // 1 where a query sees a key; null if it sees all
    T* y;  // [B, Q, H, D]

    static constexpr int64_t QUERIES = 2 * MR;  // at a time: their scores stay in the first-level cache

    // Turns a query's products into factors of the values, not yet divided by their sum, which it returns. Where the
    // machine multiplies pairs, the factors are pairs in the first half of their row.
    float soften(float* scores, int64_t wide, const uint8_t* seen) const {
        constexpr float hidden = -INFINITY;
        for (int64_t i = 0; seen && i < K; i++)
            if (!seen[i * to_mask.head]) scores[i] = hidden;
        std::fill(scores + K, scores + wide, hidden);
        vec largest = all(-3e38f), total = {};
        for (int64_t i = 0; i < wide; i += W) {
            const vec x = load(scores + i) * scale;
            largest = x > largest ? x : largest;
        }
        const float most = max(largest);
        for (int64_t i = 0; i < wide; i += W) {
            const vec x = load(scores + i) * scale - most;
            // exactly 0 where hidden; bfloat16 rounds away what the shorter sum lacks
            const vec factor = x < -80.f ? vec{} : exponential_within<std::is_same<T, bf16>::value ? 5 : 7>(x);
            if (PAIRED<T>) store_narrow(reinterpret_cast<bf16*>(scores) + i, factor);
            else store(scores + i, factor);
            total += factor;
        }
        return sum(total);
    }

    // Loads rows of D values into the cache, all at once: they lie far apart, which the processor does not foresee.
    void fetch(const T* rows, int64_t count, int64_t step) const {
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(rows + i * step + d);
    }

    void operator()(int64_t task) const {
        const int64_t b = task / H, h = task % H, steps = steps_of<T>(D), key_steps = steps_of<T>(K);
        const int64_t wide = up_to(K, NR), out_wide = up_to(D, NR);
        const T* const queries = q + b * to_q.batch + h * to_q.head;
        const T* const keys = k + b * to_k.batch + h * to_k.head;
        const T* const values = v + b * to_v.batch + h * to_v.head;
        fetch(keys, K, to_k.row);
        fetch(values, K, to_v.row);
        fetch(queries, Q, to_q.row);
        const bool in_place = std::is_same<T, float>::value || (PAIRED<T> && D % 2 == 0);
        float* const key_panels = scratch<0, float>(wide * steps);
        float* const value_panels = scratch<1, float>(out_wide * key_steps);
        float* const scores = scratch<2, float>(QUERIES * wide);
        float* const out = scratch<3, float>(QUERIES * out_wide);
        float* const copy = scratch<4, float>(in_place ? 0 : QUERIES * steps);
        for (int64_t n = 0; n < wide; n += W)  // [wide / NR][steps][NR]
            pack(keys + n * to_k.row, std::min<int64_t>(W, K - n), to_k.row, steps, D,
                 key_panels + n / NR * steps * NR + n % NR);
        pack_columns(values, K, to_v.row, D, key_steps, value_panels);
        for (int64_t q0 = 0; q0 < Q; q0 += QUERIES) {
            const int64_t rows = std::min(QUERIES, Q - q0);
            auto query = [&](int64_t r) { return queries + (q0 + r) * to_q.row; };
            for (int64_t r = 0; !in_place && r < rows; r++)
                for (int64_t s = 0; s < steps; s++) copy[r * steps + s] = step_of(query(r), s, 1, D);
            std::fill_n(scores, rows * wide, 0.f);
            std::fill_n(out, rows * out_wide, 0.f);
            for (int64_t n = 0; n < wide; n += NR)
                product<T>(
                    rows, steps,
                    [&](int64_t r) { return in_place ? reinterpret_cast<const float*>(query(r)) : copy + r * steps; },
                    key_panels + n * steps, [&](int64_t r) { return scores + r * wide + n; });
            float totals[QUERIES];
            for (int64_t r = 0; r < rows; r++) {
                float* const row = scores + r * wide;
                const uint8_t* const seen = mask ? mask + b * to_mask.batch + (q0 + r) * to_mask.row : nullptr;
                totals[r] = soften(row, wide, seen);
            }
            for (int64_t c = 0; c < D; c += NR)
                for (int64_t s = 0; s < key_steps; s += KC)
                    product<T>(
                        rows, std::min(KC, key_steps - s), [&](int64_t r) { return scores + r * wide + s; },
                        value_panels + c * key_steps + s * NR, [&](int64_t r) { return out + r * out_wide + c; });
            for (int64_t r = 0; r < rows; r++) {
                const float factor = totals[r] == 0.f ? 0.f : 1.f / totals[r];  // a query may see nothing
                for (int64_t c = 0; c < D; c += W)
                    store(out + r * out_wide + c, load(out + r * out_wide + c) * factor);
                narrow_row(out + r * out_wide, D, y + ((b * Q + q0 + r) * H + h) * D);
            }
        }
    }
};

}  // namespace
