// Runs one token of each sequence through all layers of a LLaMA-like decoder with the matrices of blocks.h.
//
// The whole step is one region of threads. It is a list of phases, and any thread takes their tasks. A thread enters a
// phase when all tasks of the previous phase are done. So a thread that comes late, or never, delays no other thread,
// and touches nothing that later phases own. Values are rounded to T wherever transformers rounds them.
#pragma once
#include "quantized.h"

namespace {

// The rows of the table that decoder.py makes: int64 addresses, 0 for none. A matrix takes four entries.
enum Field { BLOCKS, SCALE, BIAS, BITS_OF, MATRIX };
enum LayerField {
    NORM, Q, K = Q + MATRIX, V = K + MATRIX, O = V + MATRIX, Q_NORM = O + MATRIX, K_NORM, FFN_NORM, ROUTER, ROUTER_BIAS,
    ROUTER_TYPE, TAU, UP, GATE = UP + MATRIX, DOWN = GATE + MATRIX, KEYS = DOWN + MATRIX, VALUES, LENGTH, FIELDS
};

struct Shape {  // N sequences; heads of width H for queries and keys; the new token's position in a cache of `places`
    int64_t N, D, layers, q_heads, k_heads, H, E, S, V, position, places, mask_places;
};

struct Phase {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};

    template <class Task> void operator()(int64_t tasks, std::atomic<bool>& failed, const Task& task) {
        for (int64_t i; (i = next.fetch_add(1)) < tasks; done.fetch_add(1)) {
            try {
                task(i);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        }
        wait_until([&] { return done.load() >= tasks; });
    }
};

template <class A, class B> float dot(const A* a, const B* b, int64_t count) {
    vec acc = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) acc += load_wide(a + i) * load_wide(b + i);
    float s = sum(acc);
    for (; i < count; i++) s += widen(a[i]) * widen(b[i]);
    return s;
}

template <class T> float rounded(float x) {
    T t;
    narrow(x, t);
    return widen(t);
}

// y = x / rms(x) * weight; y may be x.
template <class T> void normalise(const T* x, const T* weight, int64_t count, float epsilon, T* y) {
    const float factor = 1.f / std::sqrt(dot(x, x, count) / float(count) + epsilon);
    for (int64_t i = 0; i < count; i++) narrow(widen(weight[i]) * rounded<T>(widen(x[i]) * factor), y[i]);
}

template <class T> void rotate(T* x, const T* cos, const T* sin, int64_t H) {
    for (int64_t i = 0; i < H / 2; i++) {
        const float a = widen(x[i]), b = widen(x[i + H / 2]);
        auto turned = [&](float c, float s) { return rounded<T>(c) + rounded<T>(s); };
        narrow(turned(a * widen(cos[i]), -b * widen(sin[i])), x[i]);
        narrow(turned(b * widen(cos[i + H / 2]), a * widen(sin[i + H / 2])), x[i + H / 2]);
    }
}

template <class T> class Decoder {
  public:
    Decoder(const Shape& shape, const float* numbers, const int64_t* table, int threads, int activation,
            const int64_t* ids, const T* cos, const T* sin, const uint8_t* mask, T* x, T* logits)
        : s(shape), epsilon(numbers[0]), scaling(numbers[1]), table(table), threads(threads), ids(ids), cos(cos),
          sin(sin), mask(mask), x(x), logits(logits), phases(s.layers * PER_LAYER + 2) {
        const int64_t qkv = (s.q_heads + 2 * s.k_heads) * s.H, slabs = (s.S + GROUP - 1) / GROUP;
        const int64_t wide = std::max(s.D, s.q_heads * s.H);
        h.resize(s.N * wide), y.resize(s.N * s.D), projected.resize(s.N * qkv), attended.resize(s.N * s.q_heads * s.H);
        in.resize(s.N * ((wide + GROUP - 1) / GROUP)), hidden.resize(s.N * s.E * slabs), runs.resize(s.N * s.E);
        for (int64_t l = 0; l < s.layers; l++) {
            const int64_t* const row = table + l * FIELDS;
            auto bias = [&](int i) { return at<T>(row[i + BIAS]); };
            ffns.push_back({s.N, s.D, s.E, s.S, activation, threads, h.data(), nullptr, nullptr, nullptr,
                            bias(UP), bias(GATE), bias(DOWN), y.data()});
        }
    }

    // Every thread of the region calls this.
    void run() {
        Phase* phase = phases.data();
        for (int64_t l = 0; l < s.layers; l++, phase += PER_LAYER) {
            const int64_t* const row = table + l * FIELDS;
            if (row[Q + BITS_OF] == 8) layer<8>(row, phase, ffns[l], l > 0);
            else layer<4>(row, phase, ffns[l], l > 0);
        }
        const int64_t* const row = table + s.layers * FIELDS;  // the last norm, and the head
        if (row[1 + BITS_OF] == 8) head<8>(row, phase);
        else head<4>(row, phase);
    }
    bool ran_out_of_memory() const { return failed; }

  private:
    static constexpr int PER_LAYER = 10;
    const Shape s;
    const float epsilon, scaling;
    const int64_t* const table;
    const int threads;
    const int64_t* const ids;
    const T *const cos, *const sin;
    const uint8_t* const mask;
    T *const x, *const logits;
    std::vector<Phase> phases;
    std::vector<T> h, y, projected, attended;
    std::vector<Group> in, hidden;
    std::vector<uint8_t> runs;
    std::vector<Ffn<T>> ffns;
    std::atomic<bool> failed{false};

    template <class U> static const U* at(int64_t address) { return reinterpret_cast<const U*>(address); }

    static Matrix matrix(const int64_t* field, int64_t row_parts, int64_t rows, int64_t column_parts, int64_t columns) {
        return {row_parts, rows, column_parts, columns, at<uint8_t>(field[BLOCKS]), at<bf16>(field[SCALE])};
    }

    template <int BITS> Linear<BITS, T> linear(const int64_t* field, int64_t rows, int64_t columns, T* out) const {
        const Matrix m = matrix(field, 1, rows, 1, columns);
        return {m, s.N, in.data(), at<T>(field[BIAS]), out, ranges_of(m.row_blocks(), threads)};
    }

    // Adds y to x if `add` is set, puts the norm of x in h, and puts h's groups in `in`.
    template <int BITS> void prepare(const T* weight, const Matrix& of, bool add) {
        for (int64_t n = 0; n < s.N; n++) {
            T *const row = x + n * s.D, *const out = h.data() + n * s.D;
            for (int64_t i = 0; add && i < s.D; i++) narrow(widen(row[i]) + widen(y[n * s.D + i]), row[i]);
            normalise(row, weight, s.D, epsilon, out);
            round_input<BITS>(out, of, in.data() + n * of.groups());
        }
    }

    template <int BITS> void layer(const int64_t* row, Phase* phase, Ffn<T>& f, bool add) {
        const int64_t q_wide = s.q_heads * s.H, k_wide = s.k_heads * s.H;
        T *const q = projected.data(), *const k = q + s.N * q_wide, *const v = k + s.N * k_wide;
        const auto to_q = linear<BITS>(row + Q, q_wide, s.D, q), to_k = linear<BITS>(row + K, k_wide, s.D, k);
        const auto to_v = linear<BITS>(row + V, k_wide, s.D, v), to_y = linear<BITS>(row + O, s.D, q_wide, y.data());
        const int64_t nq = to_q.tasks(), nk = to_k.tasks(), nv = to_v.tasks();
        phase[0](1, failed, [&](int64_t) {
            if (ids && !add) embed();
            prepare<BITS>(at<T>(row[NORM]), to_q.m, add);
        });
        phase[1](nq + nk + nv, failed, [&](int64_t i) {
            if (i < nq) to_q(i);
            else if (i < nq + nk) to_k(i - nq);
            else to_v(i - nq - nk);
        });
        phase[2](s.N * s.q_heads, failed, [&](int64_t i) { attend(row, i / s.q_heads, i % s.q_heads); });
        phase[3](1, failed, [&](int64_t) {
            if (row[LENGTH]) ++*reinterpret_cast<int64_t*>(row[LENGTH]);
            for (int64_t n = 0; n < s.N; n++)
                round_input<BITS>(attended.data() + n * q_wide, to_y.m, in.data() + n * to_y.m.groups());
        });
        phase[4](to_y.tasks(), failed, to_y);

        const Experts<BITS, T> e{f, matrix(row + UP, s.E, s.S, 1, s.D), matrix(row + GATE, s.E, s.S, 1, s.D),
                                 matrix(row + DOWN, 1, s.D, s.E, s.S), in.data(), hidden.data(),
                                 ranges_of(s.E * ((s.S + GROUP - 1) / GROUP), threads)};
        phase[5](1, failed, [&](int64_t) { prepare<BITS>(at<T>(row[FFN_NORM]), e.up, true); });
        const int64_t parts = std::min<int64_t>(s.E, threads > 1 ? 2 * threads : 1);
        phase[6](parts, failed, [&](int64_t i) {
            const int64_t begin = i * s.E / parts, end = (i + 1) * s.E / parts;
            if (row[ROUTER_TYPE] == 0) route<float>(row, begin, end);
            else if (row[ROUTER_TYPE] == 1) route<bf16>(row, begin, end);
            else route<f16>(row, begin, end);
        });
        phase[7](1, failed, [&](int64_t) { f.list(runs.data()); });
        phase[8](e.ranges, failed, [&](int64_t i) { e.hide(i); });
        phase[9](e.projections(), failed, [&](int64_t i) { e.project(i); });
    }

    // Computes one head of one sequence over the cache. The first head of a group writes the new key and value there.
    void attend(const int64_t* row, int64_t n, int64_t head) {
        const int64_t H = s.H, group = s.q_heads / s.k_heads, pair = head / group, L = s.position + 1;
        const T *const cos_n = cos + n * H, *const sin_n = sin + n * H;
        const int64_t q_wide = s.q_heads * H, k_wide = s.k_heads * H;
        const T* const k_in = projected.data() + s.N * q_wide + n * k_wide + pair * H;
        const T* const v_new = k_in + s.N * k_wide;
        T *const q = scratch<3, T>(2 * H), *const k = q + H;
        std::copy_n(projected.data() + n * q_wide + head * H, H, q);
        std::copy_n(k_in, H, k);
        if (row[Q_NORM]) normalise(q, at<T>(row[Q_NORM]), H, epsilon, q);
        if (row[K_NORM]) normalise(k, at<T>(row[K_NORM]), H, epsilon, k);
        rotate(q, cos_n, sin_n, H);
        rotate(k, cos_n, sin_n, H);
        T* const keys = reinterpret_cast<T*>(row[KEYS]) + (n * s.k_heads + pair) * s.places * H;
        T* const values = reinterpret_cast<T*>(row[VALUES]) + (n * s.k_heads + pair) * s.places * H;
        if (head % group == 0) {
            std::copy_n(k, H, keys + s.position * H);
            std::copy_n(v_new, H, values + s.position * H);
        }
        const uint8_t* const shown = mask ? mask + n * s.mask_places : nullptr;
        float* const scores = scratch<4, float>(L + H);
        float* const out = scores + L;
        float largest = -INFINITY, total = 0.f;
        for (int64_t j = 0; j < L; j++) {
            if (shown && !shown[j]) continue;
            scores[j] = scaling * dot(q, j < s.position ? keys + j * H : k, H);
            if (!(scores[j] <= largest)) largest = scores[j];  // NaN stays
        }
        std::fill_n(out, H, 0.f);
        for (int64_t j = 0; j < L; j++) {
            if (shown && !shown[j]) continue;
            const float weight = std::exp(scores[j] - largest);
            const T* const value = j < s.position ? values + j * H : v_new;
            const float factor = rounded<T>(weight);
            total += weight;
            int64_t d = 0;
            for (; d + W <= H; d += W) store(out + d, load(out + d) + factor * load_wide(value + d));
            for (; d < H; d++) out[d] += factor * widen(value[d]);
        }
        T* const to = attended.data() + n * q_wide + head * H;
        for (int64_t d = 0; d < H; d++) narrow(out[d] / total, to[d]);
    }

    // Says which experts run: sigmoid(h w + b) > tau, with the weights and the logit rounded to T.
    template <class R> void route(const int64_t* row, int64_t begin, int64_t end) {
        const R *const weight = at<R>(row[ROUTER]), *const bias = at<R>(row[ROUTER_BIAS]);
        const float tau = *at<float>(row[TAU]);
        std::vector<T> cast(std::is_same<R, T>::value ? 0 : s.D);
        for (int64_t e = begin; e < end; e++) {
            const T* w = reinterpret_cast<const T*>(weight + e * s.D);
            if (!std::is_same<R, T>::value) {
                for (int64_t i = 0; i < s.D; i++) narrow(widen(weight[e * s.D + i]), cast[i]);
                w = cast.data();
            }
            for (int64_t n = 0; n < s.N; n++) {
                const float b = bias ? rounded<T>(widen(bias[e])) : 0.f;
                const float logit = rounded<T>(dot(h.data() + n * s.D, w, s.D) + b);
                runs[n * s.E + e] = 1.f / (1.f + std::exp(-logit)) > tau;
            }
        }
    }

    // x = rows of the head, which the embedding is tied to
    void embed() {
        const int64_t* const field = table + s.layers * FIELDS + 1;
        const int64_t groups = (s.D + GROUP - 1) / GROUP;
        const bool whole = field[BITS_OF] == 8;  // at 4 bits a byte has the inputs i and i + 4
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t d = 0; d < s.D; d++) {
                const int64_t block = ids[n] / LANES * groups + d / GROUP, lane = ids[n] % LANES, i = d % GROUP;
                const int64_t step = whole ? block * 8 + i / 4 : block * 4 + i / 8;
                const int byte = at<uint8_t>(field[BLOCKS])[(step * LANES + lane) * 4 + i % 4];
                const int q = whole ? byte - 128 : (i % 8 < 4 ? byte & 15 : byte >> 4) - 8;
                narrow(float(q) * widen(at<bf16>(field[SCALE])[block * LANES + lane]), x[n * s.D + d]);
            }
    }

    template <int BITS> void head(const int64_t* row, Phase* phase) {
        const Linear<BITS, T> to_logits = linear<BITS>(row + 1, s.V, s.D, logits);
        phase[0](1, failed, [&](int64_t) { prepare<BITS>(at<T>(row[0]), to_logits.m, true); });
        phase[1](to_logits.tasks(), failed, to_logits);
    }
};

}  // namespace
