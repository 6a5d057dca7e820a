// Selected experts of one FFN on a CPU: y = down(act(gate x) * up x) over each token's own experts, float32 sums.
//
// cpu_ffn.py compiles this file for the machine's instruction set and describes the memory. Names carry shapes as in
// Python: N tokens, D width, E experts, S neurons per expert. Two ways:
//   few tokens:  bound by memory. Each active row is read once, for all tokens that chose its expert: dot products for
//                gate and up, then sums over rows of the transposed down, each thread owning some columns.
//   many tokens: bound by arithmetic. Tokens are grouped by expert; rows of x are read in place, weights are packed
//                into panels that stay in cache, and register tiles of MR tokens by NR columns do the rest.
// In both, who computes what never changes the order of a sum: results do not depend on the threads, nor a row on others.
#include "cpu_vector.h"

namespace {

constexpr int NR = 2 * W;                                    // columns of a register tile
constexpr int MR = W == 16 ? 12 : W == 8 ? 6 : 4;            // its rows, as many as there are registers for
constexpr int64_t KC = 256, ROWS = 8 * MR;                   // a panel in the first cache, its tokens in the second
constexpr int64_t TOKENS = 1024, BLOCK = 64 * TOKENS;        // tokens and size of an output block, in the second cache
constexpr int64_t FEW_ROWS = 16, FEW_COLUMNS = 2048;         // rows, then columns, of a task of few tokens
constexpr int64_t FEW_PAIRS = 8;                             // tokens per active expert for which they count as few
constexpr int64_t CHUNK_BYTES = int64_t(64) << 20;           // hidden activations kept at a time

enum Way { ANY, FEW, MANY };

inline int64_t up_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T> struct Ffn {
    int64_t N, D, E, S;
    int activation, threads;
    const T *x, *up, *gate, *down, *up_bias, *gate_bias, *down_bias;
    T* y;
    // The pairs (token, expert) that run, ordered by expert and then by token: those of e are first[e] to first[e + 1].
    std::vector<int64_t> first;
    std::vector<int32_t> token;
    std::vector<int32_t> active;

    void list(const uint8_t* mask) {
        first.assign(E + 1, 0);
        for (int64_t n = 0; n < N; n++)
            for (int64_t e = 0; e < E; e++) first[e + 1] += mask[n * E + e] != 0;
        for (int64_t e = 0; e < E; e++) {
            if (first[e + 1]) active.push_back(int32_t(e));
            first[e + 1] += first[e];
        }
        token.resize(first[E]);
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        for (int64_t n = 0; n < N; n++)
            for (int64_t e = 0; e < E; e++)
                if (mask[n * E + e]) token[next[e]++] = int32_t(n);
    }
    float bias(const T* b, int64_t i) const { return b ? widen(b[i]) : 0.f; }

    // Turns products into hidden activations, in place in up. Both buffers reach to the next multiple of W.
    void finish(int64_t neurons, int64_t row, float* up, float* gate_of) const {
        for (int64_t s = 0; s < neurons; s += W) {
            for (int64_t i = s; i < std::min<int64_t>(s + W, neurons); i++) {
                up[i] += bias(up_bias, row + i);
                if (gate) gate_of[i] += bias(gate_bias, row + i);
            }
            const vec u = load(up + s);
            store(up + s, gate ? activate(activation, load(gate_of + s)) * u : activate(activation, u));
        }
    }
};


// ---- few tokens

// out[t] = row . x[t], while the row at next is on its way into the cache: the processor alone would wait at each jump.
template <int TN, class T>
void dots(const T* row, const T* next, int64_t D, const float* const* x, float* const* out) {
    constexpr int UNROLL = W == 16 ? 4 : 2;
    vec acc[TN][UNROLL] = {};
    int64_t d = 0;
    for (; d + UNROLL * W <= D; d += UNROLL * W) {
        for (int b = 0; b < UNROLL * W * int(sizeof(T)); b += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(next + d) + b);
        for (int u = 0; u < UNROLL; u++) {
            const vec w = load_wide(row + d + u * W);
            for (int t = 0; t < TN; t++) acc[t][u] += w * load(x[t] + d + u * W);
        }
    }
    for (; d + W <= D; d += W)
        for (int t = 0; t < TN; t++) acc[t][0] += load_wide(row + d) * load(x[t] + d);
    for (int t = 0; t < TN; t++) {
        for (int u = 1; u < UNROLL; u++) acc[t][0] += acc[t][u];
        float s = sum(acc[t][0]);
        for (int64_t k = d; k < D; k++) s += widen(row[k]) * x[t][k];
        *out[t] = s;
    }
}

// acc[t][c] += sum over R rows of h[t][r] * rows[r][c]; next as above.
template <int R, int TN, class T>
void axpy(const T* rows, const T* next, int64_t D, int64_t columns, const float* const* h, float* const* acc) {
    constexpr int STEP = 64 / sizeof(T) > W ? 64 / sizeof(T) : W;  // a cache line at least
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

// Calls body with 4, 2 or 1 of the pairs at a time; a token's arithmetic is the same in each.
template <class Body> void few_at_a_time(int64_t begin, int64_t end, const Body& body) {
    int64_t p = begin;
    for (; p + 4 <= end; p += 4) body(p, std::integral_constant<int, 4>());
    for (; p + 2 <= end; p += 2) body(p, std::integral_constant<int, 2>());
    for (; p < end; p++) body(p, std::integral_constant<int, 1>());
}

template <class T> void few(const Ffn<T>& f) {
    const int64_t D = f.D, S = f.S, pairs = f.first[f.E];
    float* const x = scratch<0, float>(f.N * D);
    float* const h = scratch<1, float>(pairs * S);
    float* const gates = scratch<2, float>(f.gate ? pairs * S : 0);
    for (int64_t i = 0; i < f.N * D; i++) x[i] = widen(f.x[i]);

    // Slabs of rows, in ranges: within one the next row is known.
    const int64_t per_expert = (S + FEW_ROWS - 1) / FEW_ROWS, slabs = int64_t(f.active.size()) * per_expert;
    const int64_t ranges = std::min(slabs, f.threads > 1 ? 4 * int64_t(f.threads) : 1);
    auto row_of = [&](int64_t slab) { return f.active[slab / per_expert] * S + slab % per_expert * FEW_ROWS; };
    parallel(f.threads, ranges, [&](int64_t range) {
        const int64_t end = (range + 1) * slabs / ranges;
        for (int64_t slab = range * slabs / ranges; slab < end; slab++) {
            const int64_t e = f.active[slab / per_expert], row = row_of(slab), s = row - e * S;
            const int64_t rows = std::min<int64_t>(FEW_ROWS, S - s), after = slab + 1 < end ? row_of(slab + 1) : row;
            for (int64_t r = 0; r < rows; r++) {
                int64_t next = r + 1 < rows ? row + r + 1 : after;
                few_at_a_time(f.first[e], f.first[e + 1], [&](int64_t p, auto tokens) {
                    constexpr int TN = decltype(tokens)::value;
                    const float* xs[TN];
                    float *up[TN], *gate[TN];
                    for (int t = 0; t < TN; t++) {
                        xs[t] = x + f.token[p + t] * D;
                        up[t] = h + (p + t) * S + s + r;
                        gate[t] = gates + (p + t) * S + s + r;
                    }
                    if (f.gate) dots<TN>(f.gate + (row + r) * D, f.gate + next * D, D, xs, gate);
                    dots<TN>(f.up + (row + r) * D, f.up + next * D, D, xs, up);
                    next = row + r;  // on its way already
                });
            }
            for (int64_t p = f.first[e]; p < f.first[e + 1]; p++) {
                alignas(64) float up[FEW_ROWS] = {}, gate[FEW_ROWS] = {};
                std::copy_n(h + p * S + s, rows, up);
                if (f.gate) std::copy_n(gates + p * S + s, rows, gate);
                f.finish(rows, row, up, gate);
                std::copy_n(up, rows, h + p * S + s);
            }
        }
    });

    const int64_t wide = std::min(FEW_COLUMNS, up_to((D + f.threads - 1) / f.threads, 64));
    parallel(f.threads, (D + wide - 1) / wide, [&](int64_t task) {
        const int64_t c = task * wide, columns = std::min(wide, D - c);
        float* const acc = scratch<3, float>(f.N * wide);
        for (int64_t n = 0; n < f.N; n++)
            for (int64_t k = 0; k < columns; k++) acc[n * wide + k] = f.bias(f.down_bias, c + k);
        for (size_t i = 0; i < f.active.size(); i++) {
            const int64_t e = f.active[i], row = e * S, after = i + 1 < f.active.size() ? f.active[i + 1] * S : row;
            auto add = [&](auto row_count, int64_t s, int64_t next) {
                constexpr int R = decltype(row_count)::value;
                few_at_a_time(f.first[e], f.first[e + 1], [&](int64_t p, auto tokens) {
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
    });
}

// ---- many tokens

// One step of a sum over k is four bytes: a float32, or two bfloat16 where the machine multiplies these.
#if defined(__AVX512BF16__)
template <class T> constexpr bool PAIRED = std::is_same<T, bf16>::value;
inline vec multiply_add_pairs(vec acc, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
template <class T> constexpr bool PAIRED = false;
inline vec multiply_add_pairs(vec acc, vec, vec) { return acc; }
#endif
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

// panel[k][0:W] = step k of each of W rows; of zeros where there are fewer.
template <class T> void pack(const T* from, int64_t rows, int64_t steps, int64_t D, float* panel) {
    int64_t k = 0;
#if defined(__GNUC__) && !defined(__clang__)
    // blocks of W by W, transposed in registers: log2(W) times, pairs of rows swap what lies off the diagonal
    for (; rows == W && (k + W) * (PAIRED<T> ? 2 : 1) <= D; k += W) {
        vec block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; r++)
            block[r] = PAIRED<T> ? load(reinterpret_cast<const float*>(from + r * D) + k) : load_wide(from + r * D + k);
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
        for (int64_t r = 0; r < W; r++) panel[k * NR + r] = r < rows ? step_of(from + r * D, k, 1, D) : 0.f;
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
            // broadcast as an integer: two bfloat16 may look like a signalling NaN
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

// The same for any number of rows, given as functions of their index.
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

template <class T> void many(const Ffn<T>& f) {
    const int64_t D = f.D, S = f.S, pairs = f.first[f.E];
    const int64_t x_steps = steps_of<T>(D), h_steps = steps_of<T>(S), wide = up_to(S, NR);
    const float* x = reinterpret_cast<const float*>(f.x);
    if (!std::is_same<T, float>::value && (!PAIRED<T> || D % 2)) {
        float* const copy = scratch<0, float>(f.N * x_steps);
        parallel(f.threads, f.N, [&](int64_t n) {
            for (int64_t k = 0; k < x_steps; k++) copy[n * x_steps + k] = step_of(f.x + n * D, k, 1, D);
        });
        x = copy;
    }
    float* const h = scratch<1, float>(pairs * h_steps);

    parallel(f.threads, int64_t(f.active.size()), [&](int64_t task) {
        const int64_t e = f.active[task];
        const T* const weights[2] = {f.up + e * S * D, f.gate ? f.gate + e * S * D : nullptr};
        float* const panels = scratch<2, float>(2 * x_steps * wide);
        for (int which = 0; which < (f.gate ? 2 : 1); which++)  // [wide / NR][x_steps][NR]
            for (int64_t s = 0; s < wide; s += W)
                pack(weights[which] + s * D, std::min<int64_t>(W, S - s), x_steps, D,
                     panels + which * x_steps * wide + s / NR * x_steps * NR + s % NR);
        float* const hidden = scratch<3, float>(2 * ROWS * wide);
        for (int64_t p = f.first[e]; p < f.first[e + 1]; p += ROWS) {
            const int64_t rows = std::min(ROWS, f.first[e + 1] - p);
            std::fill_n(hidden, 2 * ROWS * wide, 0.f);
            for (int which = 0; which < (f.gate ? 2 : 1); which++)
                for (int64_t s = 0; s < wide; s += NR)
                    for (int64_t k = 0; k < x_steps; k += KC)
                        product<T>(
                            rows, std::min(KC, x_steps - k), [&](int64_t r) { return x + f.token[p + r] * x_steps + k; },
                            panels + (which * wide + s) * x_steps + k * NR,
                            [&](int64_t r) { return hidden + (which * ROWS + r) * wide + s; });
            for (int64_t r = 0; r < rows; r++) {
                float* const up = hidden + r * wide;
                f.finish(S, e * S, up, up + ROWS * wide);
                float* const out = h + (p + r) * h_steps;
                if (PAIRED<T>) {
                    if (S % 2) up[S] = 0.f;
                    for (int64_t s = 0; s < S + S % 2; s++) narrow(up[s], reinterpret_cast<bf16*>(out)[s]);
                } else {
                    std::copy_n(up, S, out);
                }
            }
        }
    });

    // Fewer tokens, wider blocks: rows of weights are read in longer pieces.
    const int64_t fitting = std::min(BLOCK / std::min(f.N, TOKENS), (D + f.threads - 1) / f.threads);
    const int64_t block_columns = up_to(std::min<int64_t>(fitting, 1024), NR), blocks = (D + block_columns - 1) / block_columns;
    parallel(f.threads, (f.N + TOKENS - 1) / TOKENS * blocks, [&](int64_t task) {
        const int64_t n0 = task / blocks * TOKENS, n1 = std::min(f.N, n0 + TOKENS);
        const int64_t c0 = task % blocks * block_columns, columns = std::min(block_columns, D - c0);
        float* const out = scratch<2, float>(std::min(f.N, TOKENS) * block_columns);
        float* const panels = scratch<3, float>(h_steps * block_columns);
        for (int64_t n = n0; n < n1; n++)
            for (int64_t c = 0; c < block_columns; c++)
                out[(n - n0) * block_columns + c] = c < columns ? f.bias(f.down_bias, c0 + c) : 0.f;
        for (size_t i = 0; i < f.active.size(); i++) {
            const int64_t e = f.active[i], next = f.active[std::min(i + 1, f.active.size() - 1)];
            for (int64_t s = 0; s < S; s++)  // short pieces far apart, which no processor foresees
                for (int64_t b = 0; b < columns * int64_t(sizeof(T)); b += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(f.down + (next * S + s) * D + c0) + b);
            const auto token = f.token.begin();
            const int64_t p0 = std::lower_bound(token + f.first[e], token + f.first[e + 1], n0) - token;
            const int64_t p1 = std::lower_bound(token + p0, token + f.first[e + 1], n1) - token;
            if (p0 == p1) continue;
            for (int64_t k = 0; k < h_steps; k++) {  // [block_columns / NR][h_steps][NR]
                const T* const row = f.down + e * S * D + c0;
                for (int64_t c = 0; c < block_columns; c += W) {
                    float* const to = panels + (c / NR * h_steps + k) * NR + c % NR;
                    if (c + W <= columns) store(to, steps_at(row + c, k, D, S));
                    else
                        for (int64_t i = 0; i < W; i++) to[i] = c + i < columns ? step_of(row + c + i, k, D, S) : 0.f;
                }
            }
            for (int64_t c = 0; c < columns; c += NR)
                product<T>(
                    p1 - p0, h_steps, [&](int64_t r) { return h + (p0 + r) * h_steps; }, panels + c * h_steps,
                    [&](int64_t r) { return out + (f.token[p0 + r] - n0) * block_columns + c; });
        }
        for (int64_t n = n0; n < n1; n++)
            for (int64_t c = 0; c < columns; c++) narrow(out[(n - n0) * block_columns + c], f.y[n * D + c0 + c]);
    });
}

template <class T> void run(const int64_t* shape, int activation, int threads, int way, const uint8_t* mask, void* const* p) {
    const int64_t N = shape[0], D = shape[1], E = shape[2], S = shape[3];
    auto at = [&](int i) { return static_cast<const T*>(p[i]); };
    const int64_t chunk = std::max<int64_t>(TOKENS, CHUNK_BYTES / (4 * E * S) / TOKENS * TOKENS);
    for (int64_t n = 0; n < N; n += chunk) {
        Ffn<T> f{std::min(chunk, N - n), D, E, S, activation, threads, at(0) + n * D, at(1), at(2), at(3), at(4), at(5), at(6),
                 static_cast<T*>(p[7]) + n * D};
        f.list(mask + n * E);
        const bool little = f.first[E] <= FEW_PAIRS * int64_t(f.active.size());
        if (way == FEW || (way == ANY && little)) few(f);
        else many(f);
    }
}

}  // namespace

// shape: N, D, E, S. pointers: x, up, gate, down, up_bias, gate_bias, down_bias, y; gate and biases may be null.
// way: 0 chooses, 1 is that of few tokens, 2 that of many. Returns 0, or 1 if there is no memory for the buffers.
extern "C" int lte_ffn(int dtype, const int64_t* shape, int activation, int threads, int way, const uint8_t* mask,
                       void* const* pointers) try {
    const auto run_it = dtype == 0 ? run<float> : dtype == 1 ? run<bf16> : run<f16>;
    run_it(shape, activation, threads, way, mask, pointers);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
