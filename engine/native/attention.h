// Causal attention over paged keys and values, online softmax (Milakov and Gimelshein, arXiv:1805.02867).
//
// One task is a block of a sequence's new tokens with all query heads that share one key/value head: those are the rows
// of the tiles. Keys are taken in blocks of BLOCK_KEYS that begin at multiples of it, so that a row's sums are made in
// the same order whatever else is in its task, chunk or batch.
#pragma once

#include <algorithm>
#include <limits>

#include "elementwise.h"
#include "product.h"
#include "tile.h"

namespace baton {

constexpr int BLOCK_KEYS = 64;
constexpr int KEY_PANELS = BLOCK_KEYS / LANES;
constexpr int BLOCK_ROWS = 48;  // of a task, about: tokens times heads of the group
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_GROUP = 64;  // query heads per key/value head
constexpr int MAX_ROWS = MAX_GROUP > BLOCK_ROWS ? MAX_GROUP : BLOCK_ROWS;

// Positions [start, stop) of a sequence, in rows [row, row + stop - start); its pages are pages[first_page...].
struct Span {
    int32_t row, start, stop, first_page;
};

// One layer's part of the pool: a head's part of a page is [K then V][page_size][head_dim], the next head's is
// `head_stride` on, the next page's `page_stride`.
template <class Type>
struct LayerCache {
    typename Type::Element* base;
    int64_t page_stride, head_stride;
    const int32_t* pages;
    int page_size, head_dim;

    // Keys [begin, begin + BLOCK_KEYS) of a head, nullptr from `stop` on; a value is `value_offset` behind its key.
    void locate(const typename Type::Element* (&keys)[BLOCK_KEYS], const Span& span, int head, int begin,
                int stop) const {
        const int32_t* page = pages + span.first_page + begin / page_size;
        int slot = begin % page_size;
        const int count = std::min(stop - begin, BLOCK_KEYS);
        for (int key = 0; key < count;) {
            const auto* from =
                base + *page++ * page_stride + head * head_stride + static_cast<int64_t>(slot) * head_dim;
            for (; slot < page_size && key < count; ++slot, from += head_dim) keys[key++] = from;
            slot = 0;
        }
        for (int key = std::max(count, 0); key < BLOCK_KEYS; ++key) keys[key] = nullptr;
    }

    int64_t value_offset() const { return static_cast<int64_t>(page_size) * head_dim; }
};

struct AttentionShape {
    int group, window;  // query heads per key/value head; 0: no window
    float scale;
};

template <class Element>
void fetch(const Element* from, int count) {
    constexpr int PER_LINE = 64 / sizeof(Element);
    for (int at = 0; at < count; at += PER_LINE) _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
}

// 16 rows of up to 16 words -> up to 16 words of 16 lanes.
inline void transpose(const Word* const (&from)[LANES], __mmask16 words, Word* to, int count) {
    __m512i rows[LANES], half[LANES];
    for (int row = 0; row < LANES; ++row)
        rows[row] = from[row] ? _mm512_maskz_loadu_epi32(words, from[row]) : _mm512_setzero_si512();
    for (int row = 0; row < LANES; row += 2) {
        half[row] = _mm512_unpacklo_epi32(rows[row], rows[row + 1]);
        half[row + 1] = _mm512_unpackhi_epi32(rows[row], rows[row + 1]);
    }
    for (int row = 0; row < LANES; row += 4) {
        rows[row] = _mm512_unpacklo_epi64(half[row], half[row + 2]);
        rows[row + 1] = _mm512_unpackhi_epi64(half[row], half[row + 2]);
        rows[row + 2] = _mm512_unpacklo_epi64(half[row + 1], half[row + 3]);
        rows[row + 3] = _mm512_unpackhi_epi64(half[row + 1], half[row + 3]);
    }
    // rows[4 i + j] holds word 4 q + j of input rows 4 i ... 4 i + 3 in its quarter q.
    for (int word = 0; word < 4; ++word) {
        const __m512i low01 = _mm512_shuffle_i32x4(rows[word], rows[4 + word], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(rows[word], rows[4 + word], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(rows[8 + word], rows[12 + word], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(rows[8 + word], rows[12 + word], 0xdd);
        half[word] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        half[4 + word] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        half[8 + word] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        half[12 + word] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    for (int word = 0; word < count; ++word) _mm512_storeu_si512(to + word * LANES, half[word]);
}

// Panels of V: lanes are dimensions, a word is one key (float32) or a pair of neighbours (bfloat16). These read `count`
// dimensions, at most two panels of them, of one word; to[1] belongs to the second panel. A key that is nullptr is zero.
inline void pair_values(const float* key, const float*, int count, __m512i (&to)[2]) {
    for (int panel = 0; panel < 2; ++panel) {
        const __mmask16 lanes = key && count > panel * LANES ? lanes_of(count - panel * LANES) : 0;
        to[panel] = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes, key + panel * LANES));
    }
}

inline void pair_values(const Half* first, const Half* second, int count, __m512i (&to)[2]) {
    const __mmask32 lanes = count >= 2 * LANES ? 0xffffffff : (1u << count) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(first ? lanes : 0, first);
    const __m512i high = _mm512_maskz_loadu_epi16(second ? lanes : 0, second);
    // Word w takes value w of both, in the second panel value 16 + w: indices from 32 on mean `high`.
    const __m512i words = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i pairs = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_add_epi32(words, _mm512_set1_epi32(32)), 16));
    to[0] = _mm512_permutex2var_epi16(low, pairs, high);
    to[1] = _mm512_permutex2var_epi16(low, _mm512_add_epi16(pairs, _mm512_set1_epi16(LANES)), high);
}

// One block of queries under way; the buffers of a thread.
template <class Type>
class QueryBlock {
    using Element = typename Type::Element;
    static constexpr int KEY_WORDS = BLOCK_KEYS / Type::PER_WORD;

   public:
    // `queries` is the first query head of the block's first token; the next head is head_dim on, the next token
    // `stride`. The block's tokens are at [start, stop); rows are token by token, head by head.
    void begin(const Element* queries, int64_t stride, int start, int stop, int group, int head_dim) {
        start_ = start;
        first_ = true;
        group_ = group;
        head_dim_ = head_dim;
        rows_ = (stop - start) * group;
        words_ = head_dim / Type::PER_WORD;
        dim_panels_ = (head_dim + LANES - 1) / LANES;
        for (int row = 0; row < rows_; ++row) {
            const Element* head = queries + row / group * stride + row % group * head_dim;
            std::memcpy(queries_ + row * words_, head, head_dim * sizeof(Element));
            greatest_[row] = LEAST;
            total_[row] = 0.0f;
        }
        std::fill(sums_, sums_ + static_cast<int64_t>(rows_) * dim_panels_ * LANES, 0.0f);
    }

    // Keys [begin, begin + BLOCK_KEYS), of which those below `stop` exist.
    void see(const LayerCache<Type>& cache, const Span& span, int head, int begin, int stop, AttentionShape shape) {
        auto& keys = located_[begin / BLOCK_KEYS % 2];
        auto& next = located_[begin / BLOCK_KEYS % 2 ^ 1];
        if (first_) cache.locate(keys, span, head, begin, stop);
        first_ = false;
        cache.locate(next, span, head, begin + BLOCK_KEYS, stop);
        // Pages lie anywhere: the processor can't guess where to read on. What is read after the products is on its
        // way while they are computed.
        for (int key = 0; key < BLOCK_KEYS && keys[key]; ++key) fetch(keys[key] + cache.value_offset(), head_dim_);
        for (int key = 0; key < BLOCK_KEYS && next[key]; ++key) fetch(next[key], head_dim_);
        const int panels = (std::min(stop - begin, BLOCK_KEYS) + LANES - 1) / LANES;
        transpose_keys(keys, panels);
        const Rows queries{queries_, words_, rows_};
        multiply<Type>(queries, Panels{keys_, words_}, PanelRange{0, panels}, ScoreRows{scores_});
        for (int row = 0; row < rows_; ++row) weigh(row, begin, panels, shape);
        place_values(keys, cache.value_offset(), panels);
        multiply<Type>(Rows{weights_, KEY_WORDS, rows_}, Panels{values_, panels * LANES / Type::PER_WORD},
                       PanelRange{0, dim_panels_}, AddRows{sums_, factor_, dim_panels_ * LANES});
    }

    void finish(Element* attended, int64_t stride) const {
        for (int row = 0; row < rows_; ++row) {
            Element* head = attended + row / group_ * stride + row % group_ * head_dim_;
            const __m512 scale = _mm512_set1_ps(1.0f / total_[row]);
            for (int at = 0; at < head_dim_; at += LANES) {
                const __m512 sum = _mm512_loadu_ps(sums_ + row * dim_panels_ * LANES + at);
                Type::store(head + at, _mm512_mul_ps(sum, scale), lanes_of(head_dim_ - at));
            }
        }
    }

   private:
    static constexpr float LEAST = -1e30f;  // finite: the difference of two is no NaN

    struct ScoreRows {
        float* scores;
        template <int PANELS>
        void operator()(int row, int panel, const __m512 (&sums)[PANELS]) const {
            for (int at = 0; at < PANELS; ++at)
                _mm512_storeu_ps(scores + row * BLOCK_KEYS + (panel + at) * LANES, sums[at]);
        }
    };

    struct AddRows {
        float* totals;
        const float* factor;
        int stride;
        template <int PANELS>
        void operator()(int row, int panel, const __m512 (&sums)[PANELS]) const {
            for (int at = 0; at < PANELS; ++at) {
                float* total = totals + row * stride + (panel + at) * LANES;
                _mm512_storeu_ps(total,
                                 _mm512_fmadd_ps(_mm512_loadu_ps(total), _mm512_set1_ps(factor[row]), sums[at]));
            }
        }
    };

    void transpose_keys(const Element* const (&keys)[BLOCK_KEYS], int panels) {
        for (int panel = 0; panel < panels; ++panel)
            for (int word = 0; word < words_; word += LANES) {
                const Word* from[LANES];
                for (int lane = 0; lane < LANES; ++lane) {
                    const Element* key = keys[panel * LANES + lane];
                    from[lane] = key ? reinterpret_cast<const Word*>(key) + word : nullptr;
                }
                transpose(from, lanes_of(words_ - word), keys_ + (panel * words_ + word) * LANES,
                          std::min(LANES, words_ - word));
            }
    }

    void place_values(const Element* const (&keys)[BLOCK_KEYS], int64_t offset, int panels) {
        const int words = panels * LANES / Type::PER_WORD;
        for (int word = 0; word < words; ++word) {
            const Element* first = keys[word * Type::PER_WORD];
            const Element* second = keys[word * Type::PER_WORD + Type::PER_WORD - 1];
            for (int panel = 0; panel < dim_panels_; panel += 2) {
                const int64_t at = offset + panel * LANES;
                __m512i pairs[2];
                pair_values(first ? first + at : nullptr, second ? second + at : nullptr,
                            head_dim_ - panel * LANES, pairs);
                _mm512_storeu_si512(values_ + (panel * words + word) * LANES, pairs[0]);
                if (panel + 1 < dim_panels_)
                    _mm512_storeu_si512(values_ + ((panel + 1) * words + word) * LANES, pairs[1]);
            }
        }
    }

    // Scores of a row to weights, relative to the greatest score so far; what was summed before is to be scaled.
    void weigh(int row, int begin, int panels, AttentionShape shape) {
        const int position = start_ + row / group_;
        const int oldest = shape.window ? position - shape.window + 1 : 0;
        const __m512i index = _mm512_add_epi32(
            _mm512_set1_epi32(begin), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
        __m512 scores[KEY_PANELS];
        __m512 greatest = _mm512_set1_ps(LEAST);
        for (int panel = 0; panel < panels; ++panel) {
            const __m512i keys = _mm512_add_epi32(index, _mm512_set1_epi32(panel * LANES));
            const __mmask16 seen = _mm512_cmple_epi32_mask(keys, _mm512_set1_epi32(position)) &
                                   _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(oldest));
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores_ + row * BLOCK_KEYS + panel * LANES),
                                                _mm512_set1_ps(shape.scale));
            scores[panel] = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), seen, scaled);
            greatest = _mm512_max_ps(greatest, scores[panel]);
        }
        const float before = greatest_[row];
        greatest_[row] = std::max(before, _mm512_reduce_max_ps(greatest));
        factor_[row] = before == greatest_[row] ? 1.0f : std::exp(before - greatest_[row]);
        __m512 sum = _mm512_setzero_ps();
        auto* weights = reinterpret_cast<Element*>(weights_ + row * KEY_WORDS);
        for (int panel = 0; panel < panels; ++panel) {
            const __m512 shifted = _mm512_sub_ps(scores[panel], _mm512_set1_ps(greatest_[row]));
            const __mmask16 seen = _mm512_cmp_ps_mask(scores[panel], _mm512_set1_ps(LEAST), _CMP_GT_OQ);
            const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(shifted));
            sum = _mm512_add_ps(sum, weight);
            Type::store(weights + panel * LANES, weight, 0xffff);
        }
        total_[row] = total_[row] * factor_[row] + _mm512_reduce_add_ps(sum);
    }

    const Element* located_[2][BLOCK_KEYS];
    bool first_ = true;
    int start_ = 0, group_ = 1, head_dim_ = 0, rows_ = 0, words_ = 0, dim_panels_ = 0;
    float greatest_[MAX_ROWS], total_[MAX_ROWS], factor_[MAX_ROWS];
    alignas(64) Word queries_[MAX_ROWS * MAX_HEAD_DIM];
    alignas(64) Word keys_[BLOCK_KEYS * MAX_HEAD_DIM];
    alignas(64) Word values_[BLOCK_KEYS * MAX_HEAD_DIM];
    alignas(64) float scores_[MAX_ROWS * BLOCK_KEYS];
    alignas(64) Word weights_[MAX_ROWS * BLOCK_KEYS];
    alignas(64) float sums_[MAX_ROWS * MAX_HEAD_DIM];
};

}  // namespace baton
