// The tiles of the HSTU attention. Included once per instruction set, after simd.h and product.h.

// Times of one sequence, relative to their minimum where they fit into 31 bits.
struct Times {
    bool narrow = false;    // the 31 bits suffice
    bool ordered = false;   // narrow, and no event before an earlier one or after its target: buckets fall along a row
    const int64_t *event = nullptr, *target = nullptr;
    int32_t *event_narrow = nullptr, *target_narrow = nullptr;   // [padded length]

    void set(const Attention& shape, const Unit& unit, int64_t first, int64_t end, float* scratch) {
        if (!shape.time) return;
        event = shape.timestamps + unit.token;
        target = shape.target_timestamps + unit.token;
        int64_t low = event[first], high = low;
        for (int64_t t = first; t < end; ++t) {
            low = std::min(low, std::min(event[t], target[t]));
            high = std::max(high, std::max(event[t], target[t]));
        }
        narrow = static_cast<uint64_t>(high) - static_cast<uint64_t>(low) < 0x7fffffffull;
        int64_t padded = round_up(unit.length, kTile);
        event_narrow = reinterpret_cast<int32_t*>(scratch);
        target_narrow = event_narrow + padded;
        if (!narrow) return;
        ordered = true;
        for (int64_t t = first; t < padded; ++t) {
            event_narrow[t] = t < end ? static_cast<int32_t>(event[t] - low) : INT32_MAX;
            target_narrow[t] = t < end ? static_cast<int32_t>(target[t] - low) : 0;
            ordered &= (t >= end || target_narrow[t] >= event_narrow[t]) && (t == first || event_narrow[t] >= event_narrow[t - 1]);
        }
    }
};

// Buckets of 8 differences |x| < 2^31. A float has enough bits to name the cell (no threshold is so close to the end of a cell that
// rounding would skip it), the threshold decides on the integer itself.
GRZOO_INLINE Ints narrow_buckets(const TimeBuckets& table, Ints difference) {
    Ints x = difference < splat(0) ? -difference : difference;
    x = x < splat(1) ? splat(1) : x;
    Ints cell = ((Ints)__builtin_convertvector(x, Floats) >> 21) - splat(int32_t(127 << 2));
    Ints start = gather<2>(table.cells, cell), threshold = gather<2>(table.cells + 1, cell);
    return start - (x >= threshold);
}

inline uint8_t wide_bucket(const TimeBuckets& table, int64_t target, int64_t event) {
    uint64_t a = static_cast<uint64_t>(target), b = static_cast<uint64_t>(event), x = target > event ? a - b : b - a;
    const uint64_t* end = table.thresholds + table.num_buckets - 1;
    return static_cast<uint8_t>(std::upper_bound(table.thresholds, end, x) - table.thresholds);
}

GRZOO_INLINE uint64_t repeat(int32_t bucket) { return 0x0101010101010101ull * static_cast<uint8_t>(bucket); }

// Vectors of row r of a tile that products and passes touch: those of the last row of its register block.
GRZOO_INLINE int64_t row_vectors(int64_t r, int64_t rows, int64_t vectors, int64_t ahead) {
    return std::min(vectors, vectors_of(std::min(rows, r / kRowBlock * kRowBlock + kRowBlock) + ahead));
}

// Adds the time bias of query i and `vectors` times 8 keys from j0; writes their buckets. Where times are ordered, a bucket holds
// until the difference falls below its threshold: most vectors have one bucket, found by one comparison.
template <bool kOrdered>
inline void add_narrow_time_bias(const Attention& shape, const Times& times, int64_t i, int64_t j0, int64_t vectors, float* bias,
                                 uint8_t* buckets) {
    const int32_t* event = times.event_narrow + j0;
    const int32_t target = times.target_narrow[i];
    int32_t last_event = -1, last_bucket = 0;   // events up to last_event have last_bucket
    for (int64_t w = 0; w < vectors; ++w, event += kLanes, bias += kLanes, buckets += kLanes) {
        if (kOrdered && event[kLanes - 1] <= last_event) {
            store(bias, load(bias) + splat(shape.time[last_bucket]));
            uint64_t all = repeat(last_bucket);
            memcpy(buckets, &all, sizeof all);
            continue;
        }
        Ints bucket = narrow_buckets(*shape.buckets, splat(target) - load(event));
        store(bias, load(bias) + gather(shape.time, bucket));
        store_bytes(buckets, bucket);
        if (kOrdered && event[kLanes - 1] <= target) {
            last_bucket = bucket[kLanes - 1];
            uint64_t least = last_bucket ? shape.buckets->thresholds[last_bucket - 1] : 0;
            last_event = static_cast<int32_t>(target - static_cast<int64_t>(least));
        }
    }
}

inline void add_wide_time_bias(const Attention& shape, const Times& times, int64_t i, int64_t j0, int64_t columns, float* bias,
                               uint8_t* buckets) {
    for (int64_t c = 0; c < columns; ++c) {
        buckets[c] = wide_bucket(*shape.buckets, times.target[i], times.event[j0 + c]);
        bias[c] += shape.time[buckets[c]];
    }
}

// bias [rows, kTile] and the time buckets of the tile of queries from i0 and keys from j0
inline void bias_tile(const Attention& shape, const Times& times, int64_t length, int64_t i0, int64_t j0, int64_t rows,
                      int64_t vectors, float* bias, uint8_t* buckets) {
    for (int64_t r = 0; r < rows; ++r, bias += kTile, buckets += kTile) {
        int64_t i = i0 + r, count = row_vectors(r, rows, vectors, i0 - j0);
        const float* position = shape.position + (shape.max_length - 1 + j0 - i);
        for (int64_t w = 0; w < count; ++w) store(bias + w * kLanes, load(position + w * kLanes));
        if (!shape.time) continue;
        if (times.ordered)
            add_narrow_time_bias<true>(shape, times, i, j0, count, bias, buckets);
        else if (times.narrow)
            add_narrow_time_bias<false>(shape, times, i, j0, count, bias, buckets);
        else
            add_wide_time_bias(shape, times, i, j0, std::min(count * kLanes, length - j0), bias, buckets);
    }
}

// scores -> silu(scores) * scale, zero where the key comes after the query
inline void activate(float* scores, int64_t rows, int64_t vectors, int64_t ahead, float scale) {
    for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * kTile;
        int64_t open = r + ahead + 1, count = row_vectors(r, rows, vectors, ahead), whole = std::min(count, open / kLanes);
        for (int64_t w = 0; w < whole; ++w) {
            Floats x = load(row + w * kLanes);
            store(row + w * kLanes, x * splat(scale) / (splat(1.0f) + exponential(-x)));
        }
        for (int64_t w = whole; w < count; ++w) {
            Floats x = load(row + w * kLanes), y = x * splat(scale) / (splat(1.0f) + exponential(-x));
            Ints seen = iota() + splat(int32_t(w * kLanes)) < splat(int32_t(open));
            store(row + w * kLanes, select(seen, y, splat(0.0f)));
        }
    }
}

GRZOO_INLINE void activate_backward_vector(float* scores, float* grads, float* total, bool first, Floats scale, Ints seen, bool masked) {
    Floats x = load(scores), s = sigmoid(x), g = load(grads) * scale;
    Floats weight = x * s, slope = g * (s + weight * (splat(1.0f) - s));
    weight *= scale;
    if (masked) {
        weight = select(seen, weight, splat(0.0f));
        slope = select(seen, slope, splat(0.0f));
    }
    store(scores, weight);
    store(grads, slope);
    if (total) store(total, first ? slope : load(total) + slope);
}

// scores -> weights; grads of the weights -> grads of the scores; total = (first head: 0) + grads of the scores
inline void activate_backward(float* scores, float* grads, float* total, bool first, int64_t rows, int64_t vectors, int64_t ahead,
                              float scale) {
    for (int64_t r = 0; r < rows; ++r) {
        int64_t open = r + ahead + 1, count = row_vectors(r, rows, vectors, ahead), whole = std::min(count, open / kLanes);
        float *s = scores + r * kTile, *g = grads + r * kTile, *t = total ? total + r * kTile : nullptr;
        for (int64_t w = 0; w < count; ++w) {
            Ints seen = iota() + splat(int32_t(w * kLanes)) < splat(int32_t(open));
            activate_backward_vector(s + w * kLanes, g + w * kLanes, t ? t + w * kLanes : nullptr, first, splat(scale), seen, w >= whole);
        }
    }
}

// Sums of the score gradients by distance and by bucket. Eight copies each, so that an addition does not wait for the one before:
// by the query modulo 8 (then all accesses are aligned to the same grid), and by the lane.
struct BiasSums {
    float *position = nullptr, *time = nullptr;
    int64_t origin = 0, stride = 0, num_buckets = 0;

    static int64_t floats(int64_t length, int64_t num_buckets) {
        return kLanes * (round_up(length, kLanes) + 2 * kLanes + num_buckets);
    }
    void start(float* scratch, int64_t length, int64_t buckets) {
        origin = round_up(length, kLanes);
        stride = origin + 2 * kLanes;
        num_buckets = buckets;
        position = scratch;
        time = scratch + kLanes * stride;
        memset(scratch, 0, floats(length, buckets) * sizeof(float));
    }
    void add(const float* grads, const uint8_t* buckets, int64_t i0, int64_t j0, int64_t rows, int64_t vectors) {
        for (int64_t r = 0; r < rows; ++r) {
            int64_t i = i0 + r, count = std::min(vectors, vectors_of(i - j0 + 1));
            float* sums = position + (i % kLanes) * stride + (j0 - i + i % kLanes + origin);
            const float* row = grads + r * kTile;
            for (int64_t w = 0; w < count; ++w) store(sums + w * kLanes, load(sums + w * kLanes) + load(row + w * kLanes));
            if (num_buckets == 0) continue;
            const uint8_t* bucket = buckets + r * kTile;
            for (int64_t c = 0; c < count * kLanes; c += kLanes) {
                uint64_t eight;
                memcpy(&eight, bucket + c, sizeof eight);
                if (eight == repeat(bucket[c])) {
                    float* sum = time + bucket[c] * kLanes;
                    store(sum, load(sum) + load(row + c));
                } else
                    for (int lane = 0; lane < kLanes; ++lane) time[bucket[c + lane] * kLanes + lane] += row[c + lane];
            }
        }
    }
    void finish(const Unit& unit) const {
        if (unit.position_partial)
            for (int64_t distance = 0; distance < unit.length; ++distance) {
                float total = 0.0f;
                for (int64_t copy = 0; copy < kLanes; ++copy) total += position[copy * stride + origin + copy - distance];
                unit.position_partial[distance] = total;
            }
        if (unit.time_partial)
            for (int64_t bucket = 0; bucket < num_buckets; ++bucket) unit.time_partial[bucket] = sum(load(time + bucket * kLanes));
    }
};

void forward_unit(const Attention& shape, const Unit& unit, float* scratch) {
    const int64_t heads = shape.heads, keys = shape.key_width, values = shape.value_width;
    const int64_t padded_values = round_up(values, kLanes), value_vectors = padded_values / kLanes;
    const int64_t tiles = (unit.end + kTile - 1) / kTile;
    float* packed_key = scratch;                                              // [heads, tiles, keys, kTile]
    float* packed_value = packed_key + heads * tiles * keys * kTile;          // [heads, end, padded_values]
    float* sums = packed_value + heads * unit.end * padded_values;            // [heads, kTile, padded_values]
    float* bias = sums + heads * kTile * padded_values;
    float* scores = bias + kTile * kTile;
    uint8_t* buckets = reinterpret_cast<uint8_t*>(scores + kTile * kTile);
    Times times;
    times.set(shape, unit, 0, unit.end, scores + kTile * kTile + kTile * kTile / 4);
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t tile = 0; tile < tiles; ++tile)
            pack_columns(shape.key.at(unit.token + tile * kTile, h), shape.key.token, std::min(kTile, unit.end - tile * kTile), keys,
                         packed_key + (h * tiles + tile) * keys * kTile);
        pack_rows(shape.value.at(unit.token, h), shape.value.token, unit.end, values, packed_value + h * unit.end * padded_values,
                  padded_values);
    }
    for (int64_t i0 = unit.begin; i0 < unit.end; i0 += kTile) {
        int64_t rows = std::min(kTile, unit.end - i0);
        for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
            int64_t columns = std::min(kTile, unit.end - j0), vectors = vectors_of(columns), ahead = i0 - j0;
            bias_tile(shape, times, unit.end, i0, j0, rows, vectors, bias, buckets);
            for (int64_t h = 0; h < heads; ++h) {
                Operand query{shape.query.at(unit.token + i0, h), shape.query.token, 1};
                tile_product<Causal::kColumns>(rows, vectors, keys, query, packed_key + (h * tiles + j0 / kTile) * keys * kTile, kTile,
                                               bias, scores, kTile, ahead);
                activate(scores, rows, vectors, ahead, shape.scale);
                float* sum = sums + h * kTile * padded_values;
                tile_product<Causal::kDepth>(rows, value_vectors, columns, Operand{scores, kTile, 1},
                                             packed_value + (h * unit.end + j0) * padded_values, padded_values, j0 ? sum : nullptr, sum,
                                             padded_values, ahead);
            }
        }
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t r = 0; r < rows; ++r)
                memcpy(shape.out + ((unit.token + i0 + r) * heads + h) * values, sums + (h * kTile + r) * padded_values,
                       values * sizeof(float));
    }
}

void backward_unit(const Attention& shape, const Unit& unit, float* scratch) {
    const int64_t heads = shape.heads, keys = shape.key_width, values = shape.value_width;
    const int64_t padded_keys = round_up(keys, kLanes), padded_values = round_up(values, kLanes);
    const int64_t queries = unit.length - unit.begin, first = unit.begin;
    const int64_t num_buckets = shape.time ? shape.buckets->num_buckets : 0;
    const bool bias_grads = unit.position_partial || unit.time_partial;
    float* packed_query = scratch;                                            // [heads, queries, padded_keys]
    float* packed_grad = packed_query + heads * queries * padded_keys;        // [heads, queries, padded_values]
    float* query_sums = packed_grad + heads * queries * padded_values;        // [heads, queries, padded_keys]
    float* packed_key = query_sums + heads * queries * padded_keys;           // [heads, kTile, padded_keys]
    float* key_columns = packed_key + heads * kTile * padded_keys;            // [heads, keys, kTile]
    float* value_columns = key_columns + heads * keys * kTile;                // [heads, values, kTile]
    float* key_sums = value_columns + heads * values * kTile;                 // [heads, kTile, padded_keys]
    float* value_sums = key_sums + heads * kTile * padded_keys;               // [heads, kTile, padded_values]
    float* bias = value_sums + heads * kTile * padded_values;
    float* scores = bias + kTile * kTile;
    float* grads = scores + kTile * kTile;
    float* total = grads + kTile * kTile;
    uint8_t* buckets = reinterpret_cast<uint8_t*>(total + kTile * kTile);
    float* time_scratch = total + kTile * kTile + kTile * kTile / 4;
    Times times;
    times.set(shape, unit, first, unit.length, time_scratch);
    BiasSums bias_sums;
    if (bias_grads) bias_sums.start(time_scratch + 2 * round_up(unit.length, kTile), unit.length, num_buckets);
    for (int64_t h = 0; h < heads; ++h) {
        pack_rows(shape.query.at(unit.token + first, h), shape.query.token, queries, keys, packed_query + h * queries * padded_keys,
                  padded_keys);
        pack_rows(shape.grad_out.at(unit.token + first, h), shape.grad_out.token, queries, values,
                  packed_grad + h * queries * padded_values, padded_values);
    }
    for (int64_t j0 = first; j0 < unit.end; j0 += kTile) {
        int64_t columns = std::min(kTile, unit.length - j0), vectors = vectors_of(columns);
        for (int64_t h = 0; h < heads; ++h) {
            const float* key = shape.key.at(unit.token + j0, h);
            pack_rows(key, shape.key.token, columns, keys, packed_key + h * kTile * padded_keys, padded_keys);
            pack_columns(key, shape.key.token, columns, keys, key_columns + h * keys * kTile);
            pack_columns(shape.value.at(unit.token + j0, h), shape.value.token, columns, values, value_columns + h * values * kTile);
        }
        for (int64_t i0 = j0; i0 < unit.length; i0 += kTile) {
            int64_t rows = std::min(kTile, unit.length - i0), ahead = i0 - j0;
            bias_tile(shape, times, unit.length, i0, j0, rows, vectors, bias, buckets);
            for (int64_t h = 0; h < heads; ++h) {
                const float* query = packed_query + (h * queries + i0 - first) * padded_keys;
                const float* grad = packed_grad + (h * queries + i0 - first) * padded_values;
                float* key_sum = key_sums + h * kTile * padded_keys;
                float* value_sum = value_sums + h * kTile * padded_values;
                float* query_sum = query_sums + (h * queries + i0 - first) * padded_keys;
                tile_product<Causal::kColumns>(rows, vectors, keys, Operand{query, padded_keys, 1}, key_columns + h * keys * kTile,
                                               kTile, bias, scores, kTile, ahead);
                tile_product<Causal::kColumns>(rows, vectors, values, Operand{grad, padded_values, 1},
                                               value_columns + h * values * kTile, kTile, nullptr, grads, kTile, ahead);
                activate_backward(scores, grads, bias_grads && heads > 1 ? total : nullptr, h == 0, rows, vectors, ahead, shape.scale);
                tile_product<Causal::kTail>(columns, padded_values / kLanes, rows, Operand{scores, 1, kTile}, grad, padded_values,
                                            ahead ? value_sum : nullptr, value_sum, padded_values, ahead);
                tile_product<Causal::kTail>(columns, padded_keys / kLanes, rows, Operand{grads, 1, kTile}, query, padded_keys,
                                            ahead ? key_sum : nullptr, key_sum, padded_keys, ahead);
                tile_product<Causal::kDepth>(rows, padded_keys / kLanes, columns, Operand{grads, kTile, 1},
                                             packed_key + h * kTile * padded_keys, padded_keys, j0 > first ? query_sum : nullptr,
                                             query_sum, padded_keys, ahead);
            }
            if (bias_grads) bias_sums.add(heads > 1 ? total : grads, buckets, i0, j0, rows, vectors);
        }
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t c = 0; c < columns; ++c) {
                int64_t row = (unit.token + j0 + c) * heads + h;
                memcpy(shape.grad_key + row * keys, key_sums + (h * kTile + c) * padded_keys, keys * sizeof(float));
                memcpy(shape.grad_value + row * values, value_sums + (h * kTile + c) * padded_values, values * sizeof(float));
            }
    }
    float* grad_query = unit.query_partial ? unit.query_partial : shape.grad_query + unit.token * heads * keys;
    for (int64_t r = 0; r < queries; ++r)
        for (int64_t h = 0; h < heads; ++h)
            memcpy(grad_query + (r * heads + h) * keys, query_sums + (h * queries + r) * padded_keys, keys * sizeof(float));
    if (bias_grads) bias_sums.finish(unit);
}
