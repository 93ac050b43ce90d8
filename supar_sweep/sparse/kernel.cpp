// The products of a compact layer on a CPU: y = W x + b and its gradients, at the live positions only.
//
// Tokens are taken in tiles of 64 (float32). A tile is transposed to [features, tokens], small enough for a core's second cache;
// row i of the output is then a sum of a few of its rows, held in registers. Backward walks the columns of W: one row of the
// output's gradient, once loaded, serves both the gradient to x (times the value) and that to the value (times x).
//
// Each output is one sum in one order, whichever thread makes it: bits do not depend on the number of threads. Scratch memory is
// the caller's. Plain C++17 with the vector extensions of GCC and Clang; no library but the C one and its threads.
//
// Names: S scalar, I column index, L lanes of a vector, T tokens of a tile, F features of x, O features of y.

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, tile_bytes = 256;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, tile_bytes = 256;
#else
constexpr int vector_bytes = 16, tile_bytes = 128;
#endif
constexpr int chunk = 128;      // features transposed at once: [tile, chunk] fits the first cache, and its rows are long enough
constexpr int max_dots = 128;   // dot products kept as vectors before they are summed together
constexpr int max_threads = 256;

template <class S> struct Of;
template <> struct Of<float> {
    typedef float Vector __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
    typedef int32_t Mask __attribute__((vector_size(vector_bytes)));
};
template <> struct Of<double> {
    typedef double Vector __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
    typedef int64_t Mask __attribute__((vector_size(vector_bytes)));
};
template <class S> using Vector = typename Of<S>::Vector;
template <class S> constexpr int lanes = vector_bytes / static_cast<int>(sizeof(S));
template <class S> constexpr int tile = tile_bytes / static_cast<int>(sizeof(S));

template <class S> inline Vector<S> load(const S* p) { return *reinterpret_cast<const Vector<S>*>(p); }
template <class S> inline void store(S* p, Vector<S> v) { *reinterpret_cast<Vector<S>*>(p) = v; }

// ---------------------------------------------------------------- transposition within registers

constexpr int low(int lane, int h, int n) { return (lane & h) ? n + lane - h : lane; }
constexpr int high(int lane, int h, int n) { return (lane & h) ? n + lane : lane + h; }

// swap the blocks of h lanes that stand off the diagonal of (a, b)
template <class S, int h, int... I>
inline void exchange(Vector<S>& a, Vector<S>& b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
#if defined(__clang__)
    const Vector<S> first = __builtin_shufflevector(a, b, low(I, h, n)...);
    const Vector<S> second = __builtin_shufflevector(a, b, high(I, h, n)...);
#else
    typedef typename Of<S>::Mask Mask;
    const Vector<S> first = __builtin_shuffle(a, b, Mask{low(I, h, n)...});
    const Vector<S> second = __builtin_shuffle(a, b, Mask{high(I, h, n)...});
#endif
    a = first;
    b = second;
}

template <class S, int h = lanes<S> / 2> inline void transpose_square(Vector<S>* v) {
    if constexpr (h > 0) {
        for (int i = 0; i < lanes<S>; i++)
            if (!(i & h)) exchange<S, h>(v[i], v[i + h], std::make_integer_sequence<int, lanes<S>>{});
        transpose_square<S, h / 2>(v);
    }
}

// lane i of the result: the sum over the lanes of v[i]; the same tree of additions for each i
template <class S, int h = lanes<S> / 2> inline Vector<S> sum_lanes(Vector<S>* v) {
    if constexpr (h > 0) {
        for (int i = 0; i < h; i++) {
            exchange<S, h>(v[i], v[i + h], std::make_integer_sequence<int, lanes<S>>{});
            v[i] += v[i + h];
        }
        return sum_lanes<S, h / 2>(v);
    } else {
        return v[0];
    }
}

// ---------------------------------------------------------------- activations

// [sequences, tokens, features] in memory as such, or by feature: [sequences, features, tokens]
template <class S> struct Activations {
    S* data;
    int64_t sequences, tokens, features;
    bool by_feature;

    int64_t tiles_a_sequence() const { return (tokens + tile<S> - 1) / tile<S>; }
    int64_t tiles() const { return sequences * tiles_a_sequence(); }
    int tokens_in(int64_t n) const {
        const int64_t left = tokens - n % tiles_a_sequence() * tile<S>;
        return static_cast<int>(left < tile<S> ? left : tile<S>);
    }
    // where feature f of the first token of tile n stands
    S* at(int64_t n, int64_t f) const {
        const int64_t sequence = n / tiles_a_sequence(), token = n % tiles_a_sequence() * tile<S>;
        if (by_feature) return data + (sequence * features + f) * tokens + token;
        return data + (sequence * tokens + token) * features + f;
    }
};

// write features [from, to) of tile n to out [to - from, T], zeros where the tile has no token
template <class S> void read_tile(const Activations<const S>& x, int64_t n, int64_t from, int64_t to, S* out) {
    constexpr int L = lanes<S>, T = tile<S>;
    const int n_tokens = x.tokens_in(n);
    if (x.by_feature) {
        for (int64_t f = from; f < to; f++, out += T) {
            std::memcpy(out, x.at(n, f), n_tokens * sizeof(S));
            for (int t = n_tokens; t < T; t++) out[t] = 0;
        }
        return;
    }
    // tokens outside: the rows of x are read along, which a stride of a power of two punishes least
    for (int t = 0; t < T; t += L) {
        const S* row = x.at(n, from) + t * x.features;
        int64_t f = 0;
        if (t + L <= n_tokens)
            for (; f + L <= to - from; f += L) {
                Vector<S> v[L];
                for (int i = 0; i < L; i++) v[i] = load(row + i * x.features + f);
                transpose_square<S>(v);
                for (int i = 0; i < L; i++) store(out + (f + i) * T + t, v[i]);
            }
        for (; f < to - from; f++)
            for (int i = 0; i < L; i++) out[f * T + t + i] = t + i < n_tokens ? row[i * x.features + f] : S(0);
    }
}

// collects rows [T] of a tile of the output, one feature after the other, and writes them as the output lies
template <class S> struct Writer {
    static constexpr int L = lanes<S>, T = tile<S>, stride = chunk + L;  // off a power of two
    const Activations<S>& y;
    int64_t n;
    alignas(64) S rows[L * T];
    alignas(64) S part[T * stride];

    explicit Writer(const Activations<S>& y) : y(y) {}

    // where the next row [T] is to be written: feature f of tile n; `done` has to follow
    S* row(int64_t f, int64_t from) {
        if (y.by_feature && y.tokens_in(n) == T) return y.at(n, f);
        return rows + (f - from) % L * T;
    }
    // call after each row of [from, to) in turn, to - from <= chunk
    void done(int64_t f, int64_t from, int64_t to) {
        const int n_tokens = y.tokens_in(n);
        if (y.by_feature) {
            if (n_tokens < T) std::memcpy(y.at(n, f), rows + (f - from) % L * T, n_tokens * sizeof(S));
            return;
        }
        const int64_t place = f - from;
        if (place % L == L - 1 || f + 1 == to) {
            for (int t = 0; t < T; t += L) {
                Vector<S> v[L];
                for (int i = 0; i < L; i++) v[i] = load(rows + i * T + t);
                transpose_square<S>(v);
                for (int i = 0; i < L; i++) store(part + (t + i) * stride + place / L * L, v[i]);
            }
        }
        if (f + 1 == to)
            for (int t = 0; t < n_tokens; t++)
                std::memcpy(y.at(n, from) + t * y.features, part + t * stride, (to - from) * sizeof(S));
    }
};

// ---------------------------------------------------------------- the products

template <class F> struct Task {
    const F* work;
    int index;
    pthread_t thread;
    static void* run(void* self) {
        auto* task = static_cast<Task*>(self);
        (*task->work)(task->index);
        return nullptr;
    }
};

// work(0), ..., work(n - 1), each in a thread of its own where the system has one to give
template <class F> void in_threads(int n, const F& work) {
    Task<F> tasks[max_threads];
    bool started[max_threads] = {};
    for (int i = 1; i < n; i++) {
        tasks[i].work = &work;
        tasks[i].index = i;
        started[i] = pthread_create(&tasks[i].thread, nullptr, Task<F>::run, &tasks[i]) == 0;
    }
    work(0);
    for (int i = 1; i < n; i++) {
        if (started[i])
            pthread_join(tasks[i].thread, nullptr);
        else
            work(i);
    }
}

// out [NV * L] = start + sum over k of values[k] * table[index[k]]
template <class S, class I, int NV>
inline void weighted_rows(const S* table, const I* index, const S* values, int32_t begin, int32_t end, S start, S* out) {
    constexpr int L = lanes<S>, T = tile<S>;
    Vector<S> sums[NV];
    for (int n = 0; n < NV; n++) sums[n] = start - Vector<S>{};
    for (int32_t k = begin; k < end; k++) {
        const S* row = table + static_cast<int64_t>(index[k]) * T;
        const Vector<S> value = values[k] - Vector<S>{};
        for (int n = 0; n < NV; n++) sums[n] += value * load(row + n * L);
    }
    for (int n = 0; n < NV; n++) store(out + n * L, sums[n]);
}

template <class S, class I, int NV>
void forward_tile(const S* x_FT, const I* cols, const int32_t* row_starts, const S* values, const S* bias, int64_t O,
                  Writer<S>& out) {
    for (int64_t from = 0; from < O; from += chunk) {
        const int64_t to = from + chunk < O ? from + chunk : O;
        for (int64_t o = from; o < to; o++) {
            const S start = bias ? bias[o] : S(0);
            weighted_rows<S, I, NV>(x_FT, cols, values, row_starts[o], row_starts[o + 1], start, out.row(o, from));
            out.done(o, from, to);
        }
    }
}

// scratch: threads * F * T
template <class S, class I>
void forward(const Activations<const S>& x, const Activations<S>& y, const I* cols, const int32_t* row_starts,
             const S* values, const S* bias, int threads, S* scratch) {
    constexpr int L = lanes<S>, T = tile<S>, full = T / L;
    in_threads(threads, [&](int thread) {
        S* x_FT = scratch + thread * x.features * T;
        Writer<S> out(y);
        for (int64_t n = thread; n < x.tiles(); n += threads) {
            out.n = n;
            read_tile(x, n, 0, x.features, x_FT);
            // a sequence's last tile may have few tokens
            if (const int used = x.tokens_in(n); used <= T / 4)
                forward_tile<S, I, full / 4>(x_FT, cols, row_starts, values, bias, y.features, out);
            else if (used <= T / 2)
                forward_tile<S, I, full / 2>(x_FT, cols, row_starts, values, bias, y.features, out);
            else
                forward_tile<S, I, full>(x_FT, cols, row_starts, values, bias, y.features, out);
        }
    });
}

// The pattern by column: rows_t and values_t [nnz]. places [F] is used up.
template <class S, class I>
void transpose_pattern(const I* cols, const int32_t* row_starts, const int32_t* col_starts, int64_t F, int64_t O,
                       const S* values, int32_t* places, int32_t* rows_t, S* values_t) {
    std::memcpy(places, col_starts, F * sizeof(int32_t));
    for (int64_t o = 0; o < O; o++)
        for (int32_t k = row_starts[o]; k < row_starts[o + 1]; k++) {
            const int32_t place = places[cols[k]]++;
            rows_t[place] = static_cast<int32_t>(o);
            values_t[place] = values[k];
        }
}

// adds the sums over lanes of the first n vectors to sums [n]
template <class S> void flush(const Vector<S>* dots, int n, S* sums) {
    constexpr int L = lanes<S>;
    for (int j = 0; j < n; j += L) {
        Vector<S> v[L];
        for (int i = 0; i < L; i++) v[i] = j + i < n ? dots[j + i] : Vector<S>{};
        const Vector<S> sum = sum_lanes<S>(v);
        if (j + L <= n)
            store(sums + j, load(sums + j) + sum);
        else
            for (int i = 0; j + i < n; i++) sums[j + i] += sum[i];
    }
}

// one tile's part of both gradients, for columns [first, last)
template <class S, int NV>
void backward_tile(const S* grad_OT, const Activations<const S>& x, const int32_t* rows_t, const S* values_t,
                   const int32_t* col_starts, int64_t first, int64_t last, S* sums_t, Writer<S>* out, int64_t n) {
    constexpr int L = lanes<S>, T = tile<S>;
    alignas(64) S x_FT[chunk * T];
    alignas(64) Vector<S> dots[max_dots];
    int kept = 0;
    for (int64_t from = first; from < last; from += chunk) {
        const int64_t to = from + chunk < last ? from + chunk : last;
        read_tile(x, n, from, to, x_FT);
        for (int64_t f = from; f < to; f++) {
            Vector<S> here[NV], sums[NV];
            for (int i = 0; i < NV; i++) {
                here[i] = load(x_FT + (f - from) * T + i * L);
                sums[i] = Vector<S>{};
            }
            for (int32_t k = col_starts[f]; k < col_starts[f + 1];) {
                const int64_t room = int64_t{k} + max_dots - kept;
                const int32_t stop = room < col_starts[f + 1] ? static_cast<int32_t>(room) : col_starts[f + 1];
                for (; k < stop; k++) {
                    const S* row = grad_OT + static_cast<int64_t>(rows_t[k]) * T;
                    const Vector<S> value = values_t[k] - Vector<S>{};
                    Vector<S> even{}, odd{};
                    for (int i = 0; i < NV; i++) {
                        const Vector<S> grad = load(row + i * L);
                        sums[i] += value * grad;
                        if (i % 2)
                            odd += grad * here[i];
                        else
                            even += grad * here[i];
                    }
                    dots[kept++] = even + odd;
                }
                if (kept == max_dots) {
                    flush<S>(dots, kept, sums_t + k - kept);
                    kept = 0;
                }
            }
            if (out) {
                S* row = out->row(f, from);
                for (int i = 0; i < NV; i++) store(row + i * L, sums[i]);
                out->done(f, from, to);
            }
        }
    }
    flush<S>(dots, kept, sums_t + col_starts[last] - kept);
}

// Scratch: grads [tiles if threads > 1 else 1, O, T], sums_t and values_t [nnz], rows_t [nnz], places [F].
// grad_x.data, grad_values and grad_bias may be null: that gradient is not made.
template <class S, class I>
void backward(const Activations<const S>& grad, const Activations<const S>& x, const Activations<S>& grad_x, const I* cols,
              const int32_t* row_starts, const int32_t* col_starts, const S* values, S* grad_values, S* grad_bias,
              int threads, S* grads, S* sums_t, S* values_t, int32_t* rows_t, int32_t* places) {
    constexpr int L = lanes<S>, T = tile<S>, full = T / L;
    const int64_t F = x.features, O = grad.features, n_tiles = x.tiles();
    const int64_t apart = threads > 1 ? O * T : 0;
    transpose_pattern(cols, row_starts, col_starts, F, O, values, places, rows_t, values_t);
    std::memset(sums_t, 0, col_starts[F] * sizeof(S));
    if (grad_bias) std::memset(grad_bias, 0, O * sizeof(S));
    auto tile_columns = [&](int64_t n, int64_t first, int64_t last, Writer<S>* out) {
        const S* grad_OT = grads + n * apart;
        if (out) out->n = n;
        if (const int used = x.tokens_in(n); used <= T / 4)
            backward_tile<S, full / 4>(grad_OT, x, rows_t, values_t, col_starts, first, last, sums_t, out, n);
        else if (used <= T / 2)
            backward_tile<S, full / 2>(grad_OT, x, rows_t, values_t, col_starts, first, last, sums_t, out, n);
        else
            backward_tile<S, full>(grad_OT, x, rows_t, values_t, col_starts, first, last, sums_t, out, n);
    };
    auto add_bias = [&](int64_t n) {
        for (int64_t o = 0; o < O; o++) {
            const S* row = grads + n * apart + o * T;
            Vector<S> sum{};
            for (int t = 0; t < T; t += L) sum += load(row + t);
            S total = 0;
            for (int i = 0; i < L; i++) total += sum[i];
            grad_bias[o] += total;
        }
    };
    if (threads == 1) {
        Writer<S> out(grad_x);
        for (int64_t n = 0; n < n_tiles; n++) {
            read_tile(grad, n, 0, O, grads);
            if (grad_bias) add_bias(n);
            tile_columns(n, 0, F, grad_x.data ? &out : nullptr);
        }
    } else {
        in_threads(threads, [&](int thread) {
            for (int64_t n = thread; n < n_tiles; n += threads) read_tile(grad, n, 0, O, grads + n * apart);
        });
        in_threads(threads, [&](int thread) {
            Writer<S> out(grad_x);
            const int64_t first = F * thread / threads, last = F * (thread + 1) / threads;
            for (int64_t n = 0; n < n_tiles; n++) tile_columns(n, first, last, grad_x.data ? &out : nullptr);
            if (grad_bias && thread == 0)
                for (int64_t n = 0; n < n_tiles; n++) add_bias(n);
        });
    }
    if (grad_values) {
        std::memcpy(places, col_starts, F * sizeof(int32_t));
        for (int32_t k = 0; k < row_starts[O]; k++) grad_values[k] = sums_t[places[cols[k]]++];
    }
}

int bounded(int64_t threads) { return static_cast<int>(threads < 1 ? 1 : threads > max_threads ? max_threads : threads); }

template <class S>
void forward_of(const void* x, int64_t x_by_feature, void* y, int64_t y_by_feature, int64_t sequences, int64_t tokens,
                int64_t F, int64_t O, const void* cols, int64_t cols_bytes, const int32_t* row_starts, const void* values,
                const void* bias, int64_t threads, void* scratch) {
    const Activations<const S> in{static_cast<const S*>(x), sequences, tokens, F, x_by_feature != 0};
    const Activations<S> out{static_cast<S*>(y), sequences, tokens, O, y_by_feature != 0};
    auto run = [&](auto* typed_cols) {
        forward(in, out, typed_cols, row_starts, static_cast<const S*>(values), static_cast<const S*>(bias), bounded(threads),
                static_cast<S*>(scratch));
    };
    cols_bytes == 2 ? run(static_cast<const int16_t*>(cols)) : run(static_cast<const int32_t*>(cols));
}

template <class S>
void backward_of(const void* grad, int64_t grad_by_feature, const void* x, int64_t x_by_feature, void* grad_x,
                 int64_t sequences, int64_t tokens, int64_t F, int64_t O, const void* cols, int64_t cols_bytes,
                 const int32_t* row_starts, const int32_t* col_starts, const void* values, void* grad_values, void* grad_bias,
                 int64_t threads, void* grads, void* sums_t, void* values_t, int32_t* rows_t, int32_t* places) {
    const Activations<const S> g{static_cast<const S*>(grad), sequences, tokens, O, grad_by_feature != 0};
    const Activations<const S> in{static_cast<const S*>(x), sequences, tokens, F, x_by_feature != 0};
    // the gradient to x lies in memory as x does
    const Activations<S> out{static_cast<S*>(grad_x), sequences, tokens, F, x_by_feature != 0};
    auto run = [&](auto* typed_cols) {
        backward(g, in, out, typed_cols, row_starts, col_starts, static_cast<const S*>(values), static_cast<S*>(grad_values),
                 static_cast<S*>(grad_bias), bounded(threads), static_cast<S*>(grads), static_cast<S*>(sums_t),
                 static_cast<S*>(values_t), rows_t, places);
    };
    cols_bytes == 2 ? run(static_cast<const int16_t*>(cols)) : run(static_cast<const int32_t*>(cols));
}

}  // namespace

extern "C" {

// bytes of one feature of a tile: what a caller needs to know to give scratch memory
int64_t supar_tile_bytes() { return tile_bytes; }

#define SUPAR_PRODUCTS(S, name)                                                                                                 \
    void supar_forward_##name(const void* x, int64_t x_by_feature, void* y, int64_t y_by_feature, int64_t sequences,            \
                              int64_t tokens, int64_t F, int64_t O, const void* cols, int64_t cols_bytes,                       \
                              const int32_t* row_starts, const void* values, const void* bias, int64_t threads,                 \
                              void* scratch) {                                                                                  \
        forward_of<S>(x, x_by_feature, y, y_by_feature, sequences, tokens, F, O, cols, cols_bytes, row_starts, values, bias,    \
                      threads, scratch);                                                                                        \
    }                                                                                                                           \
    void supar_backward_##name(const void* grad, int64_t grad_by_feature, const void* x, int64_t x_by_feature, void* grad_x,    \
                               int64_t sequences, int64_t tokens, int64_t F, int64_t O, const void* cols, int64_t cols_bytes,   \
                               const int32_t* row_starts, const int32_t* col_starts, const void* values, void* grad_values,     \
                               void* grad_bias, int64_t threads, void* grads, void* sums_t, void* values_t, int32_t* rows_t,    \
                               int32_t* places) {                                                                               \
        backward_of<S>(grad, grad_by_feature, x, x_by_feature, grad_x, sequences, tokens, F, O, cols, cols_bytes, row_starts,   \
                       col_starts, values, grad_values, grad_bias, threads, grads, sums_t, values_t, rows_t, places);           \
    }

SUPAR_PRODUCTS(float, float32)
SUPAR_PRODUCTS(double, float64)
}
