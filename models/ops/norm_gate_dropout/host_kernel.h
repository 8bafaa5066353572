// Rows of LayerNorm, gate and dropout; see host.cpp. Sums run over eight lanes, always in the same order. The rows of scratch
// are padded to whole vectors with zeros.

GRZOO_INLINE Floats load_some(const float* p, int64_t count) {
    if (count >= kLanes) return load(p);
#ifdef GRZOO_AVX2
    return (Floats)_mm256_maskload_ps(p, (__m256i)(iota() < splat(static_cast<int32_t>(count))));
#else
    Floats v = splat(0.0f);
    __builtin_memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
    return v;
#endif
}
GRZOO_INLINE void store_some(float* p, Floats v, int64_t count) {
    if (count >= kLanes) return store(p, v);
#ifdef GRZOO_AVX2
    _mm256_maskstore_ps(p, (__m256i)(iota() < splat(static_cast<int32_t>(count))), (__m256)v);
#else
    __builtin_memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
#endif
}

// body(c, count) for the vectors of a row: `count` of the eight lanes from column c are in the row.
template <typename F>
GRZOO_INLINE void each_vector(int64_t n, F&& body) {
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) body(c, static_cast<int64_t>(kLanes));
    if (c < n) body(c, n - c);
}

// normed = (x - mean) / sqrt(var + eps), zero beyond the row; returns 1 / sqrt(var + eps).
GRZOO_INLINE float normalize(const float* x, int64_t n, float eps, float* normed) {
    const float share = 1.0f / static_cast<float>(n);
    Floats total = splat(0.0f), squares = splat(0.0f);
    each_vector(n, [&](int64_t c, int64_t count) GRZOO_LAMBDA { total += load_some(x + c, count); });
    const float mean = sum(total) * share;
    each_vector(n, [&](int64_t c, int64_t count) GRZOO_LAMBDA {
        const Floats centred = select(iota() < splat(static_cast<int32_t>(count)), load_some(x + c, count) - splat(mean), splat(0.0f));
        store(normed + c, centred);
        squares += centred * centred;
    });
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) * share + eps);
    each_vector(n, [&](int64_t c, int64_t) GRZOO_LAMBDA { store(normed + c, load(normed + c) * splat(scale)); });
    return scale;
}

// factor[c]: what dropout multiplies column c of token t by.
GRZOO_INLINE void dropout_factors(const NormGate& s, int64_t t, float* __restrict__ factor) {
    const uint64_t key = static_cast<uint64_t>(s.row_keys[t]), least = s.least;
    const uint64_t* __restrict__ addends = s.addends;
    const float kept = s.kept;
    for (int64_t c = 0; c < s.columns; ++c) factor[c] = mix_upper_bits(key + addends[c]) >= least ? kept : 0.0f;
}

// scratch: 3 padded rows, zero
static void forward_rows(const NormGate& s, int64_t first, int64_t end, float* scratch) {
    const int64_t n = s.columns, padded = round_up_lanes(n);
    float *normed = scratch, *factor = scratch + padded;
    const bool dropout = s.row_keys != nullptr;
    for (int64_t t = first; t < end; ++t) {
        normalize(s.x + t * s.x_stride, n, s.eps, normed);
        if (dropout) dropout_factors(s, t, factor);
        const float* gate = s.gate + t * s.gate_stride;
        float* out = s.out + t * n;
        each_vector(n, [&](int64_t c, int64_t count) GRZOO_LAMBDA {
            Floats y = load(normed + c) * load_some(gate + c, count);
            if (dropout) y *= load(factor + c);
            store_some(out + c, y, count);
        });
    }
}

// With d = dy * factor * gate: dx = scale * (d - mean(d) - normed * mean(d * normed)); dgate = dy * factor * normed.
static void backward_rows(const NormGate& s, int64_t first, int64_t end, float* scratch) {
    const int64_t n = s.columns, padded = round_up_lanes(n);
    const float share = 1.0f / static_cast<float>(n);
    float *normed = scratch, *factor = scratch + padded, *d = scratch + 2 * padded;
    const bool dropout = s.row_keys != nullptr;
    for (int64_t t = first; t < end; ++t) {
        const float scale = normalize(s.x + t * s.x_stride, n, s.eps, normed);
        if (dropout) dropout_factors(s, t, factor);
        const float *gate = s.gate + t * s.gate_stride, *grad = s.grad + t * s.grad_stride;
        float *dx = s.out + t * n, *dgate = s.dgate + t * n;
        Floats total = splat(0.0f), along = splat(0.0f);
        each_vector(n, [&](int64_t c, int64_t count) GRZOO_LAMBDA {
            Floats g = load_some(grad + c, count);
            if (dropout) g *= load(factor + c);
            const Floats z = load(normed + c), v = g * load_some(gate + c, count);
            store_some(dgate + c, g * z, count);
            store(d + c, v);
            total += v;
            along += v * z;
        });
        const Floats mean = splat(sum(total) * share), slope = splat(sum(along) * share);
        each_vector(n, [&](int64_t c, int64_t count) GRZOO_LAMBDA {
            store_some(dx + c, splat(scale) * (load(d + c) - mean - load(normed + c) * slope), count);
        });
    }
}
