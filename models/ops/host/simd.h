// Vectors of 8 floats. Included once per instruction set, inside that set's namespace: no include guard, no includes.
// With GRZOO_AVX2 the compiler emits AVX2 and FMA; without, the same code is lowered to what the target has.

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

constexpr int kLanes = 8;

GRZOO_INLINE Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
GRZOO_INLINE Ints load(const int32_t* p) {
    Ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
GRZOO_INLINE void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
GRZOO_INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x}; }
GRZOO_INLINE Ints splat(int32_t x) { return Ints{x, x, x, x, x, x, x, x}; }
GRZOO_INLINE Ints iota() { return Ints{0, 1, 2, 3, 4, 5, 6, 7}; }
GRZOO_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
GRZOO_INLINE Floats bits_to_float(Ints v) { return (Floats)v; }

GRZOO_INLINE float sum(Floats v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

constexpr int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The sums of eight vectors.
GRZOO_INLINE Floats sums(const Floats* v) {
#ifdef GRZOO_AVX2
    auto add = [](Floats a, Floats b) GRZOO_LAMBDA { return (Floats)_mm256_hadd_ps((__m256)a, (__m256)b); };
    __m256 low = (__m256)add(add(v[0], v[1]), add(v[2], v[3])), high = (__m256)add(add(v[4], v[5]), add(v[6], v[7]));
    return (Floats)_mm256_permute2f128_ps(low, high, 0x20) + (Floats)_mm256_permute2f128_ps(low, high, 0x31);
#else
    return Floats{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3]), sum(v[4]), sum(v[5]), sum(v[6]), sum(v[7])};
#endif
}

// Eight numbers below 256 as bytes.
GRZOO_INLINE void store_bytes(uint8_t* p, Ints v) {
#ifdef GRZOO_AVX2
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
    for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<uint8_t>(v[lane]);
#endif
}

template <int kStride>
GRZOO_INLINE Ints gather(const int32_t* table, Ints index) {
#ifdef GRZOO_AVX2
    return (Ints)_mm256_i32gather_epi32(table, (__m256i)index, 4 * kStride);
#else
    Ints v;
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = table[index[lane] * kStride];
    return v;
#endif
}
GRZOO_INLINE Floats gather(const float* table, Ints index) {
#ifdef GRZOO_AVX2
    return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    Floats v;
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = table[index[lane]];
    return v;
#endif
}

// NaN stays NaN.
GRZOO_INLINE Floats clamp(Floats x, float low, float high) {
#ifdef GRZOO_AVX2
    return (Floats)_mm256_max_ps((__m256)splat(low), _mm256_min_ps((__m256)splat(high), (__m256)x));
#else
    x = x > splat(high) ? splat(high) : x;
    return x < splat(low) ? splat(low) : x;
#endif
}

// e^x, relative error below 2e-7; x is clamped to where the result is a normal number. NaN stays NaN.
GRZOO_INLINE Floats exponential(Floats x) {
    x = clamp(x, -87.0f, 88.0f);
    const Floats shift = splat(12582912.0f);   // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    Floats shifted = x * splat(1.44269504f) + shift;
    Floats whole = shifted - shift;
    Floats rest = x - whole * splat(0.693145751953125f);   // ln 2 in two parts, the first with few bits
    rest = rest - whole * splat(1.42860677e-6f);
    Floats p = splat(1.381461437e-03f);
    p = p * rest + splat(8.368710003e-03f);
    p = p * rest + splat(4.166838735e-02f);
    p = p * rest + splat(1.666652069e-01f);
    p = p * rest + splat(4.999999345e-01f);
    p = p * rest + splat(1.0f);
    p = p * rest + splat(1.0f);
    return (Floats)((Ints)p + ((Ints)shifted << 23));
}

GRZOO_INLINE Floats sigmoid(Floats x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }
