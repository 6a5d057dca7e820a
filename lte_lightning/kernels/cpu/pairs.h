// One FFN, its tokens, and the experts that they run.
#pragma once
#include "vector.h"

namespace {

inline int64_t up_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <int N> using constant = std::integral_constant<int, N>;

// Calls body with MOST, 4, 2 or 1 of the numbers at a time. The arithmetic of each is the same in every case.
template <int MOST, class Body> void at_a_time(int64_t begin, int64_t end, const Body& body) {
    for (; begin + MOST <= end; begin += MOST) body(begin, constant<MOST>());
    if (begin + 4 <= end) body(begin, constant<4>()), begin += 4;
    if (begin + 2 <= end) body(begin, constant<2>()), begin += 2;
    if (begin < end) body(begin, constant<1>());
}

template <class T> struct Ffn {
    int64_t N, D, E, S;
    int activation, threads;
    const T *x, *up, *gate, *down, *up_bias, *gate_bias, *down_bias;
    T* y;
    // The pairs (token, expert) that run, ordered by expert and then by token. Expert e has first[e] to first[e + 1].
    std::vector<int64_t> first;
    std::vector<int32_t> token;
    std::vector<int32_t> active;

    void list(const uint8_t* mask) {
        first.assign(E + 1, 0);
        active.clear();
        each(mask, [&](int64_t, int64_t e) { first[e + 1]++; });
        for (int64_t e = 0; e < E; e++) {
            if (first[e + 1]) active.push_back(int32_t(e));
            first[e + 1] += first[e];
        }
        token.resize(first[E]);
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        each(mask, [&](int64_t n, int64_t e) { token[next[e]++] = int32_t(n); });
    }

    // Calls body(token, expert) for each pair that runs. It reads the mask, whose bytes are 0 or 1, by eights: whether a
    // single expert runs is nothing that a processor could predict.
    template <class Body> void each(const uint8_t* mask, const Body& body) const {
        for (int64_t n = 0; n < N; n++) {
            const uint8_t* const row = mask + n * E;
            int64_t e = 0;
            for (; e + 8 <= E; e += 8) {
                uint64_t eight;
                std::memcpy(&eight, row + e, 8);
                for (; eight; eight &= eight - 1) body(n, e + first_byte(eight));
            }
            for (; e < E; e++)
                if (row[e]) body(n, e);
        }
    }
    static int first_byte(uint64_t eight) {  // the byte with the first bit, in the order of memory
        return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_ctzll(eight) / 8 : 7 - __builtin_ctzll(eight) / 8;
    }
    float bias(const T* b, int64_t i) const { return b ? widen(b[i]) : 0.f; }

    // Turns products into hidden activations, in place in up. Both buffers reach to the next multiple of W.
    void finish(int64_t neurons, int64_t row, float* up, float* gate_of) const {
        auto add = [&](const T* bias, int64_t s, float* to) {
            if (bias && s + W <= neurons) store(to + s, load(to + s) + load_wide(bias + row + s));
            else
                for (int64_t i = s; bias && i < neurons; i++) to[i] += widen(bias[row + i]);
        };
        for (int64_t s = 0; s < neurons; s += W) {
            add(up_bias, s, up);
            if (gate) add(gate_bias, s, gate_of);
            const vec u = load(up + s);
            store(up + s, gate ? activate(activation, load(gate_of + s)) * u : activate(activation, u));
        }
    }
};

}  // namespace
