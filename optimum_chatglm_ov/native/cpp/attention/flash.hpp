// SPDX-License-Identifier: Apache-2.0
// Append and flash-style attention of one task, over the matrix products of one instruction set.
//   Products  DotProducts or TileProducts: Element, scores(), accumulate()
//   Vector    f32 vectors for the softmax
#pragma once

#include "attention/kernel.hpp"
#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr float kHidden = -__builtin_inff();
constexpr int64_t kRowGroup = 32;  // rows whose scores are in the first-level cache at a time
// Tasks of so few queries would wait for memory: it is kept busy while earlier blocks are worked on, and blocks go
// through the first-level cache a few at a time.
constexpr int64_t kFewQueries = 2;
constexpr int64_t kStreamedBlocks = 2;
constexpr int64_t kStreamedRows = 8;  // with fewer, the processor's own prefetching does better

// Not the standard ones: the linker may merge those across instruction sets.
template <class T>
inline T greater(T a, T b) {
    return a < b ? b : a;
}
template <class T>
inline T lesser(T a, T b) {
    return b < a ? b : a;
}
inline void fill(float* begin, float* end, float value) {
    while (begin < end) *begin++ = value;
}

inline void prefetch(const uint8_t* address, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(address + i, 0, 3);
}

inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// head_dim activations of one token and head as f32, the first rotary_dim of them rotated.
inline void load_rotated(const AttentionArguments& a, const void* base, int64_t offset, const float* cos,
                         const float* sin, float* __restrict row) {
    if (a.activation_type == ActivationType::f32) {
        std::memcpy(row, static_cast<const float*>(base) + offset, a.head_dim * 4);
    } else {
        const uint16_t* source = static_cast<const uint16_t*>(base) + offset;
        for (int64_t d = 0; d < a.head_dim; d++) row[d] = from_bf16(source[d]);
    }
    if (!cos) return;
    const int64_t half = a.rotary_dim / 2;
    float* __restrict second = row + half;
    for (int64_t d = 0; d < half; d++) {
        const float x1 = row[d], x2 = second[d];
        row[d] = x1 * cos[d] - x2 * sin[d];
        second[d] = x2 * cos[half + d] + x1 * sin[half + d];
    }
}

inline const float* rotary_row(const AttentionArguments& a, const float* table, int64_t batch, int64_t token) {
    return table + batch * a.rotary_batch_stride + token * a.rotary_dim;
}

inline uint8_t* cache_block(const AttentionArguments& a, uint8_t* cache, int64_t row, int64_t head, int64_t block) {
    return cache + ((row * a.num_key_value_heads + head) * a.cache_blocks + block) *
                       cache_block_bytes(a.cache_precision, a.head_dim);
}

inline float* block_scales(uint8_t* block, int64_t head_dim) {
    return reinterpret_cast<float*>(block + kBlockTokens * head_dim);
}

// Channels of a key, or tokens of a channel of the values, that lie together in a block: 4 bytes of them.
template <class Element>
constexpr int64_t kTogether = 4 / sizeof(Element);

// Element offset of a channel of a token in a key block and in a value block.
template <class Element>
int64_t key_offset(int64_t token, int64_t channel, int64_t head_dim) {
    constexpr int64_t n = kTogether<Element>;
    return (token / 16) * 16 * head_dim + (channel / n) * 16 * n + (token % 16) * n + channel % n;
}
template <class Element>
int64_t value_offset(int64_t token, int64_t channel, int64_t head_dim) {
    constexpr int64_t n = kTogether<Element>;
    return (token / n) * n * head_dim + channel * n + token % n;
}

// Integers and the scale of one row for the int8 cache. Written for the compiler to vectorise: the largest magnitude
// is found among bit patterns, and adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
inline float quantize(const float* row, int64_t head_dim, int8_t* __restrict integers) {
    int32_t bits = 0;
    for (int64_t d = 0; d < head_dim; d++)
        bits = greater(bits, static_cast<int32_t>(as_bits(row[d]) & 0x7fffffffu));
    const float largest = as_float(bits);
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (int64_t d = 0; d < head_dim; d++)
        integers[d] = static_cast<int8_t>(as_bits(row[d] * inverse + 12582912.0f) - 0x4b400000u);
    return largest / 127.0f;
}

// f32 -> what the cache holds. Returns the scale of an int8 row, 1 otherwise.
inline float encode(const float* row, int64_t head_dim, float* target) {
    std::memcpy(target, row, head_dim * 4);
    return 1.0f;
}
inline float encode(const float* row, int64_t head_dim, uint16_t* __restrict target) {
    for (int64_t d = 0; d < head_dim; d++) target[d] = to_bf16(row[d]);
    return 1.0f;
}
inline float encode(const float* row, int64_t head_dim, int8_t* target) {
    return quantize(row, head_dim, target);
}

// Values beyond the last token become zero, so that weight 0 times value is 0 whatever the memory held.
template <class Element>
void clear_values(Element* data, int64_t from, int64_t head_dim) {
    constexpr int64_t n = kTogether<Element>;
    const int64_t whole = round_up(from, n);
    for (int64_t t = from; t < whole; t++)
        for (int64_t d = 0; d < head_dim; d++) data[value_offset<Element>(t, d, head_dim)] = 0;
    std::memset(data + whole * head_dim, 0, (kBlockTokens - whole) * head_dim * sizeof(Element));
}

template <class Element>
void append_keys(const AttentionArguments& a, int64_t batch, int64_t head, int64_t first, int64_t last) {
    constexpr int64_t n = kTogether<Element>;
    alignas(64) float row[kMaxHeadDim];
    alignas(64) Element encoded[kMaxHeadDim];
    for (int64_t t = first; t < last; t++) {
        const int64_t slot = a.past_length + t;
        load_rotated(a, a.key, (batch * a.query_length + t) * a.key_stride + head * a.head_dim,
                     a.rotary_dim ? rotary_row(a, a.cos, batch, t) : nullptr,
                     a.rotary_dim ? rotary_row(a, a.sin, batch, t) : nullptr, row);
        uint8_t* block = cache_block(a, a.key_cache, batch, head, slot / kBlockTokens);
        const float scale = encode(row, a.head_dim, encoded);
        if constexpr (sizeof(Element) == 1) {
            block_scales(block, a.head_dim)[slot % kBlockTokens] = scale;
            for (int64_t d = 0; d < a.head_dim; d++) encoded[d] ^= kKeyOffset;  // + 128, as unsigned bytes
        }
        Element* target = reinterpret_cast<Element*>(block) + key_offset<Element>(slot % kBlockTokens, 0, a.head_dim);
        for (int64_t d = 0; d < a.head_dim; d += n) std::memcpy(target + d * 16, encoded + d, 4);
    }
}

template <class Element>
void append_values(const AttentionArguments& a, int64_t batch, int64_t head, int64_t first, int64_t last) {
    constexpr int64_t n = kTogether<Element>;
    alignas(64) float row[kMaxHeadDim];
    alignas(64) Element encoded[n][kMaxHeadDim];
    for (int64_t t = first; t < last;) {
        const int64_t slot = a.past_length + t, token = slot % kBlockTokens;
        const int64_t count = token % n == 0 && t + n <= last ? n : 1;  // all that lie together, or one of them
        uint8_t* block = cache_block(a, a.value_cache, batch, head, slot / kBlockTokens);
        for (int64_t i = 0; i < count; i++) {
            load_rotated(a, a.value, (batch * a.query_length + t + i) * a.value_stride + head * a.head_dim, nullptr,
                         nullptr, row);
            const float scale = encode(row, a.head_dim, encoded[i]);
            if (sizeof(Element) == 1) block_scales(block, a.head_dim)[token + i] = scale;
        }
        Element* __restrict target =
            reinterpret_cast<Element*>(block) + value_offset<Element>(token, 0, a.head_dim);
        if (count == n)
            for (int64_t d = 0; d < a.head_dim; d++)
                for (int64_t i = 0; i < n; i++) target[d * n + i] = encoded[i][d];
        else
            for (int64_t d = 0; d < a.head_dim; d++) target[d * n] = encoded[0][d];
        t += count;
    }
}

inline void append_tokens(const AttentionArguments& a, int64_t batch, int64_t head, int64_t first, int64_t last) {
    if (a.cache_precision == CachePrecision::f32) {
        append_keys<float>(a, batch, head, first, last);
        append_values<float>(a, batch, head, first, last);
    } else if (a.cache_precision == CachePrecision::bf16) {
        append_keys<uint16_t>(a, batch, head, first, last);
        append_values<uint16_t>(a, batch, head, first, last);
    } else {
        append_keys<int8_t>(a, batch, head, first, last);
        append_values<int8_t>(a, batch, head, first, last);
    }
    const int64_t used = (a.past_length + last) % kBlockTokens;
    if (last != a.query_length || used == 0) return;
    uint8_t* block = cache_block(a, a.value_cache, batch, head, (a.past_length + last) / kBlockTokens);
    if (a.cache_precision == CachePrecision::f32) {
        clear_values(reinterpret_cast<float*>(block), used, a.head_dim);
    } else if (a.cache_precision == CachePrecision::bf16) {
        clear_values(reinterpret_cast<uint16_t*>(block), used, a.head_dim);
    } else {
        clear_values(reinterpret_cast<int8_t*>(block), used, a.head_dim);
        float* scales = block_scales(block, a.head_dim);
        fill(scales + used, scales + kBlockTokens, 0.0f);
    }
}

// A block whose tokens live in several cache rows, put together in `target` in the cache's own layout.
template <class Element, bool kIsKey>
void gather_tokens(const AttentionArguments& a, uint8_t* cache, int64_t batch, int64_t head, int64_t block,
                   uint8_t* target) {
    constexpr int64_t n = kTogether<Element>;
    const int64_t head_dim = a.head_dim, total = a.past_length + a.query_length;
    std::memset(target, 0, cache_block_bytes(a.cache_precision, head_dim));
    for (int64_t t = 0; t < kBlockTokens && block * kBlockTokens + t < total; t++) {
        const int64_t slot = block * kBlockTokens + t;
        const int64_t row = slot < a.past_length ? a.beam_table[batch * a.beam_table_stride + slot] : batch;
        uint8_t* source = cache_block(a, cache, row, head, block);
        for (int64_t d = 0; d < head_dim; d += kIsKey ? n : 1) {
            const int64_t at = kIsKey ? key_offset<Element>(t, d, head_dim) : value_offset<Element>(t, d, head_dim);
            std::memcpy(reinterpret_cast<Element*>(target) + at, reinterpret_cast<Element*>(source) + at,
                        sizeof(Element) * (kIsKey ? n : 1));
        }
        if (a.cache_precision == CachePrecision::i8)
            block_scales(target, head_dim)[t] = block_scales(source, head_dim)[t];
    }
}

inline void gather_block(const AttentionArguments& a, const AttendTask& task, int64_t block, bool is_key,
                         uint8_t* target) {
    uint8_t* cache = is_key ? a.key_cache : a.value_cache;
    if (a.cache_precision == CachePrecision::f32)
        is_key ? gather_tokens<float, true>(a, cache, task.batch, task.kv_head, block, target)
               : gather_tokens<float, false>(a, cache, task.batch, task.kv_head, block, target);
    else if (a.cache_precision == CachePrecision::bf16)
        is_key ? gather_tokens<uint16_t, true>(a, cache, task.batch, task.kv_head, block, target)
               : gather_tokens<uint16_t, false>(a, cache, task.batch, task.kv_head, block, target);
    else
        is_key ? gather_tokens<uint8_t, true>(a, cache, task.batch, task.kv_head, block, target)
               : gather_tokens<uint8_t, false>(a, cache, task.batch, task.kv_head, block, target);
}

// Bit j: token j of a block that begins at first_token is seen by a query that sees the keys before `limit`.
inline uint32_t visible_before(uint32_t visible, int64_t first_token, int64_t limit) {
    const int64_t before = lesser<int64_t>(greater<int64_t>(limit - first_token, 0), kBlockTokens);
    return visible & (before == kBlockTokens ? ~0u : (static_cast<uint32_t>(1) << before) - 1);
}

// First key that query `position` (counted from the start of the cache) does not see.
inline int64_t key_limit(int64_t context_length, int64_t position) {
    return greater(context_length, position + 1);
}

inline float to_float(uint16_t value) {
    return from_bf16(value);
}
inline float to_float(uint8_t key) {
    return static_cast<float>(static_cast<int>(key) - kKeyOffset);
}
inline float to_float(int8_t value) {
    return static_cast<float>(value);
}

// The same with other elements, each in a row of its own: what lies together here, n of them, lies n rows apart there.
template <class Stored>
void convert_block(const Stored* source, int64_t rows, int64_t count, float* __restrict target) {
    constexpr int64_t n = kTogether<Stored>;
    for (int64_t r = 0; r < rows; r += n, source += n * count, target += n * count)
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < n; j++) target[j * count + i] = to_float(source[n * i + j]);
}

// From fours to pairs. Exact: bf16 has 8 significant bits.
template <class Stored>
void convert_block(const Stored* source, int64_t rows, int64_t count, uint16_t* __restrict target) {
    for (int64_t r = 0; r < rows; r += 4, source += 4 * count, target += 4 * count)
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < 4; j++)
                target[j / 2 * 2 * count + 2 * i + j % 2] =
                    static_cast<uint16_t>(as_bits(to_float(source[4 * i + j])) >> 16);
}

template <class Products, class Vector>
struct Flash {
    using Element = typename Products::Element;
    using Stored = CachePrecision;
    static constexpr bool kF32 = Products::kStored == Stored::f32, kInt8 = Products::kStored == Stored::i8;
    static constexpr int64_t kPanelBlocks = Products::kPanelBlocks;
    static constexpr int64_t kPanelTokens = kPanelBlocks * kBlockTokens;

    // Other caches are converted, without loss.
    static bool accepts(int64_t head_dim, CachePrecision precision) {
        const bool converts = kF32 || (!kInt8 && precision == Stored::i8);
        return Products::accepts(head_dim) && (precision == Products::kStored || converts);
    }

    // Where the parts of the scratch memory are.
    struct Scratch {
        Element* query;       // [rows, head_dim]; the scale is applied to the scores
        float* query_scale;   // [rows], of integer queries
        float* query_offset;  // [rows], what their integer scores are too large by
        float* output;        // [rows, head_dim]
        float* row_max;       // [rows]
        float* row_sum;       // [rows]
        float* scores;        // [kRowGroup, kPanelTokens], f32 or i32
        Element* weights;     // [kRowGroup, kPanelTokens]
        float* factors;       // [kRowGroup], of integer sums of weights and values
        float* rests;         // [kRowGroup], sums of what integer weights were rounded by
        float* value_sum;     // [head_dim], of integer values
        Element* converted;  // [2 * kPanelBlocks] blocks
        uint8_t* gathered;   // [2 * kPanelBlocks] blocks of the cache's layout
        size_t bytes;

        Scratch(const AttentionArguments& a, int64_t rows, void* memory) {
            uint8_t* base = static_cast<uint8_t*>(memory);
            size_t offset = 0;
            const auto take = [&](size_t size) {
                uint8_t* part = base + offset;
                offset += round_up(size, 64);
                return part;
            };
            rows = round_up(rows, kRowGroup);
            query = reinterpret_cast<Element*>(take(rows * a.head_dim * sizeof(Element)));
            query_scale = reinterpret_cast<float*>(take(rows * 4));
            query_offset = reinterpret_cast<float*>(take(rows * 4));
            output = reinterpret_cast<float*>(take(rows * a.head_dim * 4));
            row_max = reinterpret_cast<float*>(take(rows * 4));
            row_sum = reinterpret_cast<float*>(take(rows * 4));
            scores = reinterpret_cast<float*>(take(kRowGroup * kPanelTokens * 4));
            weights = reinterpret_cast<Element*>(take(kRowGroup * kPanelTokens * sizeof(Element)));
            factors = reinterpret_cast<float*>(take(kRowGroup * 4));
            rests = reinterpret_cast<float*>(take(kRowGroup * 4));
            value_sum = reinterpret_cast<float*>(take(a.head_dim * 4));
            converted = reinterpret_cast<Element*>(take(2 * kPanelTokens * a.head_dim * sizeof(Element)));
            gathered = take(2 * kPanelBlocks * cache_block_bytes(a.cache_precision, a.head_dim));
            bytes = offset;
        }
    };

    static size_t scratch_bytes(const AttentionArguments& a, int64_t rows) { return Scratch(a, rows, nullptr).bytes; }

    // Up to kPanelBlocks cache blocks in the form the products read.
    struct Panel {
        int64_t count = 0;
        int64_t first_token[kPanelBlocks];
        uint32_t visible[kPanelBlocks];
        const uint8_t* stored_keys[kPanelBlocks];
        const uint8_t* stored_values[kPanelBlocks];
        const Element* keys[kPanelBlocks];
        const Element* values[kPanelBlocks];
        const float* key_scales[kPanelBlocks];
        const float* value_scales[kPanelBlocks];

        uint32_t visible_before(int64_t b, int64_t limit) const {
            return optimum_chatglm_ov::visible_before(visible[b], first_token[b], limit);
        }
    };

    static const Element* readable(const AttentionArguments& a, const AttendTask& task, int64_t block, bool is_key,
                                   Scratch& scratch, int64_t index, const float** scales) {
        uint8_t* cache = is_key ? a.key_cache : a.value_cache;
        const int64_t row = task.blocks[block].cache_row;
        uint8_t* data;
        if (row >= 0) {
            data = cache_block(a, cache, row, task.kv_head, block);
        } else {
            data = scratch.gathered + index * cache_block_bytes(a.cache_precision, a.head_dim);
            gather_block(a, task, block, is_key, data);
        }
        *scales = a.cache_precision == Stored::i8 ? block_scales(data, a.head_dim) : nullptr;
        Element* target = scratch.converted + index * kBlockTokens * a.head_dim;
        if constexpr (!kInt8) {
            const int64_t rows = is_key ? 2 * a.head_dim : kBlockTokens, count = is_key ? 16 : a.head_dim;
            if (a.cache_precision == Stored::i8) {
                is_key ? convert_block(data, rows, count, target)
                       : convert_block(reinterpret_cast<const int8_t*>(data), rows, count, target);
                return target;
            }
            if constexpr (kF32) {
                if (a.cache_precision == Stored::bf16) {
                    convert_block(reinterpret_cast<const uint16_t*>(data), rows, count, target);
                    return target;
                }
            }
        }
        return reinterpret_cast<const Element*>(data);
    }

    static bool few_queries(const AttendTask& task) { return task.last_query - task.first_query <= kFewQueries; }

    // The cache holds what the products read.
    static bool reads_directly(const AttentionArguments& a) { return a.cache_precision == Products::kStored; }

    static void store_elements(Element* target, Vector elements) {
        if constexpr (kF32)
            elements.store(target);
        else
            elements.store_bf16(target);
    }

    // Scores of a block, with the scales of its keys, hidden ones at minus infinity; the largest so far of each lane.
    static Vector finish_scores(float* scores, const float* key_scales, float offset, uint32_t visible,
                                Vector largest) {
        constexpr int64_t kLanes = Vector::kLanes;
        if (kInt8 || key_scales)
            for (int64_t j = 0; j < kBlockTokens; j += kLanes) {
                Vector s;
                if constexpr (kInt8)
                    s = Vector::add(Vector::load_integers(scores + j), Vector::all(-offset));
                else
                    s = Vector::load(scores + j);
                Vector::multiply(s, Vector::load(key_scales + j)).store(scores + j);
            }
        if (visible != ~0u)
            for (int64_t j = 0; j < kBlockTokens; j++) scores[j] = (visible >> j & 1) ? scores[j] : kHidden;
        for (int64_t j = 0; j < kBlockTokens; j += kLanes) largest = Vector::maximum(largest, Vector::load(scores + j));
        return largest;
    }

    // Row r of scores -> weights; updates the running maximum and sum, returns the factor by which what was summed
    // before shrinks. Weights are 2^(score - maximum so far), times the scale of the value. Integer ones are rounded
    // relative to the largest of the row, which factors[] makes up for: what a row does not see changes nothing in it.
    static float softmax_row(const Panel& panel, int64_t count, int64_t limit, float scale, int64_t r, int64_t first,
                             Scratch& scratch) {
        constexpr int64_t kLanes = Vector::kLanes;
        float* scores = scratch.scores + (r - first) * kPanelTokens;
        Element* weights = scratch.weights + (r - first) * kPanelTokens;
        float &row_max = scratch.row_max[r], &row_sum = scratch.row_sum[r];
        Vector largest = Vector::all(kHidden);
        uint32_t any_visible = 0;
        for (int64_t b = 0; b < count; b++) {
            const uint32_t visible = panel.visible_before(b, limit);
            any_visible |= visible;
            largest = finish_scores(scores + b * kBlockTokens, panel.key_scales[b],
                                    kInt8 ? scratch.query_offset[r] : 0.0f, visible, largest);
        }
        if (kInt8) scale *= scratch.query_scale[r];
        const float new_max = greater(row_max, largest.max_lane() * scale);
        const int64_t length = count * kBlockTokens;
        if (!any_visible) {
            std::memset(weights, 0, length * sizeof(Element));
            scratch.factors[r - first] = scratch.rests[r - first] = 0.0f;
            return 1.0f;
        }
        const Vector factor = Vector::all(scale), shift = Vector::all(-new_max);
        Vector sum = Vector::all(0.0f), largest_weight = sum;
        for (int64_t j = 0; j < length; j += kLanes) {
            const Vector w =
                Vector::template exp2<Exp2<kF32>>(Vector::multiply_add(Vector::load(scores + j), factor, shift));
            sum = Vector::add(sum, w);
            Vector scaled = w;
            if (kInt8 || panel.value_scales[0])
                scaled = Vector::multiply(w, Vector::load(panel.value_scales[j / kBlockTokens] + j % kBlockTokens));
            if constexpr (kInt8) {
                scaled.store(scores + j);
                largest_weight = Vector::maximum(largest_weight, scaled);
            } else {
                store_elements(weights + j, scaled);
            }
        }
        if constexpr (kInt8) round_weights(scores, weights, length, largest_weight.max_lane(), r - first, scratch);
        const float shrink = row_max == new_max ? 1.0f : std::exp2(row_max - new_max);
        row_sum = row_sum * shrink + sum.sum_lanes();
        row_max = new_max;
        return shrink;
    }

    // Bytes in proportion to f32 weights of which `largest` is the largest.
    static void round_weights(const float* exact, Element* weights, int64_t length, float largest, int64_t row,
                              Scratch& scratch) {
        const Vector steps = Vector::all(largest > 1e-30f ? kWeightSteps / largest : 0.0f);
        Vector rest = Vector::all(0.0f);
        for (int64_t j = 0; j < length; j += Vector::kLanes) {
            const Vector scaled = Vector::multiply(Vector::load(exact + j), steps), whole = Vector::round(scaled);
            whole.store_bytes(weights + j);
            rest = Vector::add(rest, Vector::subtract(scaled, whole));
        }
        scratch.factors[row] = largest / kWeightSteps;
        scratch.rests[row] = rest.sum_lanes();
    }

    static void attend(const AttentionArguments& a, const AttendTask& task, void* memory) {
        const int64_t head_dim = a.head_dim, group = a.num_attention_heads / a.num_key_value_heads;
        const int64_t rows = (task.last_query - task.first_query) * group;
        const int64_t padded_rows = round_up(rows, Products::kRowMultiple);
        const int64_t context_length = a.context_length ? a.context_length[task.batch] : 0;
        const float scale = a.scale * 1.44269504f;  // the softmax runs on powers of two
        Scratch scratch(a, rows, memory);
        std::memset(scratch.output, 0, padded_rows * head_dim * 4);
        fill(scratch.row_max, scratch.row_max + rows, kHidden);
        fill(scratch.row_sum, scratch.row_sum + rows, 0.0f);
        load_queries(a, task, group, rows, padded_rows, scratch);

        typename Products::Session session;
        const int64_t end = lesser(
            task.last_block,
            (key_limit(context_length, a.past_length + task.last_query - 1) + kBlockTokens - 1) / kBlockTokens);
        const int64_t panel_blocks = few_queries(task) && !reads_directly(a) ? kStreamedBlocks : kPanelBlocks;
        for (int64_t block = task.first_block; block < end;) {
            Panel panel;
            for (; block < end && panel.count < panel_blocks; block++) {
                if (task.blocks[block].visible == 0) continue;
                const int64_t i = panel.count++;
                panel.first_token[i] = block * kBlockTokens;
                panel.visible[i] = task.blocks[block].visible;
                const int64_t row = greater<int64_t>(task.blocks[block].cache_row, 0);
                panel.stored_keys[i] = cache_block(a, a.key_cache, row, task.kv_head, block);
                panel.stored_values[i] = cache_block(a, a.value_cache, row, task.kv_head, block);
                panel.keys[i] = readable(a, task, block, true, scratch, i, &panel.key_scales[i]);
                panel.values[i] =
                    readable(a, task, block, false, scratch, kPanelBlocks + i, &panel.value_scales[i]);
            }
            for (int64_t first = 0; first < rows; first += kRowGroup) {
                const int64_t last = lesser(first + kRowGroup, rows);
                const int64_t furthest =
                    key_limit(context_length, a.past_length + task.first_query + (last - 1) / group);
                int64_t count = panel.count;
                while (count > 0 && panel.first_token[count - 1] >= furthest) count--;
                if (count == 0) continue;
                attend_rows(session, a, task, panel, count, first, last, group, context_length, scale, scratch);
            }
        }
        write_results(a, task, group, rows, scratch);
    }

private:
    static void attend_rows(typename Products::Session& session, const AttentionArguments& a, const AttendTask& task,
                            const Panel& panel, int64_t count, int64_t first, int64_t last, int64_t group,
                            int64_t context_length, float scale, Scratch& scratch) {
        const int64_t head_dim = a.head_dim, padded = round_up(last - first, Products::kRowMultiple);
        const Element* query = scratch.query + first * head_dim;
        const bool few = few_queries(task);
        // Values read directly are needed after the scores of this panel, converted ones with the next panel.
        const int64_t value_distance = reads_directly(a) ? 0 : kStreamedBlocks;
        const int64_t bytes = cache_block_bytes(a.cache_precision, head_dim);
        if (!few) Products::scores(session, query, padded, panel.keys, count, head_dim, scratch.scores, kPanelTokens);
        for (int64_t b = 0; few && b < count; b++) {
            const uint8_t* const ahead[2] = {panel.stored_keys[b] + kStreamedBlocks * bytes,
                                             panel.stored_values[b] + value_distance * bytes};
            Products::scores_ahead(session, query, padded, panel.keys + b, head_dim,
                                   scratch.scores + b * kBlockTokens, kPanelTokens, ahead, bytes);
        }
        const auto limit_of = [&](int64_t r) {
            return key_limit(context_length, a.past_length + task.first_query + r / group);
        };
        float mean_factor = 0;
        if constexpr (kInt8) mean_factor = sum_values(session, a, panel, count, limit_of(first), scratch);
        for (int64_t r = first; r < last; r++) {
            const float shrink = softmax_row(panel, count, limit_of(r), scale, r, first, scratch);
            float* output = scratch.output + r * head_dim;
            const Vector factor = Vector::all(shrink);
            if constexpr (kInt8) {
                const Vector rest = Vector::all(scratch.rests[r - first] * scratch.factors[r - first] * mean_factor);
                for (int64_t d = 0; d < head_dim; d += Vector::kLanes)
                    Vector::multiply_add(rest, Vector::load(scratch.value_sum + d),
                                         Vector::multiply(Vector::load(output + d), factor))
                        .store(output + d);
            } else if (shrink != 1.0f) {
                for (int64_t d = 0; d < head_dim; d += Vector::kLanes)
                    Vector::multiply(Vector::load(output + d), factor).store(output + d);
            }
        }
        for (int64_t r = last - first; r < padded; r++)
            std::memset(scratch.weights + r * kPanelTokens, 0, kPanelTokens * sizeof(Element));
        const int64_t step = few && padded >= kStreamedRows ? kStreamedBlocks : count;
        for (int64_t b = 0; b < count; b += step) {
            for (int64_t next = b + step; next < lesser(b + 2 * step, count); next++)
                prefetch(panel.stored_values[next], bytes);
            Products::accumulate(session, scratch.weights + b * kBlockTokens, kPanelTokens, padded, scratch.factors,
                                 panel.values + b, lesser(step, count - b), head_dim,
                                 scratch.output + first * head_dim);
        }
    }

    // What weights lose by rounding goes to the mean of the values, or the many small weights beside a large one would
    // count for nothing. The mean is of values before `limit`, which every row of the group sees.
    // Sums those values; returns the inverse of their number, 0 if there is none.
    static float sum_values(typename Products::Session& session, const AttentionArguments& a, const Panel& panel,
                            int64_t count, int64_t limit, Scratch& scratch) {
        int64_t tokens = 0;
        for (int64_t b = 0; b < count; b++) {
            const uint32_t visible = panel.visible_before(b, limit);
            for (int64_t j = 0; j < kBlockTokens; j++) scratch.weights[b * kBlockTokens + j] = visible >> j & 1;
            tokens += __builtin_popcount(visible);
        }
        const float one = 1.0f;
        fill(scratch.value_sum, scratch.value_sum + a.head_dim, 0.0f);
        Products::accumulate(session, scratch.weights, kPanelTokens, 1, &one, panel.values, count, a.head_dim,
                             scratch.value_sum);
        return tokens ? 1.0f / tokens : 0.0f;
    }

    static void load_queries(const AttentionArguments& a, const AttendTask& task, int64_t group, int64_t rows,
                             int64_t padded_rows, Scratch& scratch) {
        const int64_t head_dim = a.head_dim;
        alignas(64) float row[kMaxHeadDim];
        for (int64_t r = 0; r < rows; r++) {
            const int64_t token = task.first_query + r / group, head = task.kv_head * group + r % group;
            load_rotated(a, a.query, (task.batch * a.query_length + token) * a.query_stride + head * head_dim,
                         a.rotary_dim ? rotary_row(a, a.cos, task.batch, token) : nullptr,
                         a.rotary_dim ? rotary_row(a, a.sin, task.batch, token) : nullptr, row);
            Element* query = scratch.query + r * head_dim;
            if constexpr (kInt8) {
                int8_t* integers = reinterpret_cast<int8_t*>(query);
                const float found = quantize(row, head_dim, integers);
                scratch.query_scale[r] = found < 1e-30f ? 1e-30f : found;  // 0 times a hidden score would be a NaN
                int32_t sum = 0;
                for (int64_t d = 0; d < head_dim; d++) sum += integers[d];
                scratch.query_offset[r] = static_cast<float>(sum * kKeyOffset);
            } else {
                for (int64_t d = 0; d < head_dim; d += Vector::kLanes)
                    store_elements(query + d, Vector::load(row + d));
            }
        }
        std::memset(scratch.query + rows * head_dim, 0, (padded_rows - rows) * head_dim * sizeof(Element));
    }

    static void write_results(const AttentionArguments& a, const AttendTask& task, int64_t group, int64_t rows,
                              Scratch& scratch) {
        const int64_t head_dim = a.head_dim;
        if (task.partial_output) {
            std::memcpy(task.partial_output, scratch.output, rows * head_dim * 4);
            std::memcpy(task.partial_max, scratch.row_max, rows * 4);
            std::memcpy(task.partial_sum, scratch.row_sum, rows * 4);
            return;
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t token = task.first_query + r / group, head = task.kv_head * group + r % group;
            const int64_t offset =
                ((task.batch * a.query_length + token) * a.num_attention_heads + head) * head_dim;
            const float* source = scratch.output + r * head_dim;
            const float inverse = scratch.row_sum[r] > 0 ? 1.0f / scratch.row_sum[r] : scratch.row_sum[r];
            if (a.activation_type == ActivationType::f32) {
                float* __restrict target = static_cast<float*>(a.output) + offset;
                for (int64_t d = 0; d < head_dim; d++) target[d] = source[d] * inverse;
            } else {
                uint16_t* __restrict target = static_cast<uint16_t*>(a.output) + offset;
                for (int64_t d = 0; d < head_dim; d++) target[d] = to_bf16(source[d] * inverse);
            }
        }
    }
};

template <class Products, class Vector>
const AttentionKernels* make_attention_kernels() {
    using F = Flash<Products, Vector>;
    static const AttentionKernels kernels{append_tokens, F::scratch_bytes, F::attend, F::accepts, 256};
    return &kernels;
}

}  // namespace
}  // namespace optimum_chatglm_ov
