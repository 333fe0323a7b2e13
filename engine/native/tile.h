// Products of small tiles, the one inner loop of all kernels here.
//
// Everything is counted in words of 32 bits: a word holds two neighbouring bfloat16 values, or one float32. A tile is
//
//     sums[row][lane] += sum over words w of  left[row][w] . right[w][lane]
//
// where "." is the product of two float32, or the sum of the two products of bfloat16 pairs. `left` is row-major; a
// word of it is broadcast to all lanes. `right` has 16 lanes of one w side by side, in panels. Each sum is accumulated
// in float32, in order of w, whatever the tile's shape: a row's result does not depend on the rows beside it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace baton {

constexpr int LANES = 16;

using Word = uint32_t;
using Half = uint16_t;  // the bits of a bfloat16

inline float widen(Half half) {
    const Word bits = static_cast<Word>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline __m512 widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

// To the nearest bfloat16, ties to even. NaN stays NaN.
inline __m256i narrow(__m512 values) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
#else
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}

// What the element types differ in.
struct Float32 {
    using Element = float;
    static constexpr int PER_WORD = 1;

    static __m512 load(const Element* from) { return _mm512_loadu_ps(from); }
    static __m512 load(const Element* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
    static void store(Element* to, __m512 values, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, values); }
    static __m512 multiply_add(__m512 sums, __m512i left, __m512i right) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sums);
    }
};

struct BFloat16 {
    using Element = Half;
    static constexpr int PER_WORD = 2;

    static __m512 load(const Element* from) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static __m512 load(const Element* from, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, from)); }
    static void store(Element* to, __m512 values, __mmask16 lanes) { _mm256_mask_storeu_epi16(to, lanes, narrow(values)); }
    static __m512 multiply_add(__m512 sums, __m512i left, __m512i right) {
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
#else
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        const __m512 first = _mm512_fmadd_ps(
            _mm512_castsi512_ps(_mm512_slli_epi32(left, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), sums);
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, high)),
                               _mm512_castsi512_ps(_mm512_and_si512(right, high)), first);
#endif
    }
};

// The lanes of `count` remaining columns.
inline __mmask16 lanes_of(int count) { return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

// Bytes of a panel to fetch ahead: with few panels at a time the processor's own prefetching is late.
constexpr int AHEAD = 2048;

// `PANELS` panels of `right` lie `panel_stride` words apart, each [words][LANES]; `left` rows `left_stride` words.
template <class Type, int ROWS, int PANELS>
inline void multiply_tile(__m512 (&sums)[ROWS][PANELS], const Word* left, int64_t left_stride, const Word* right,
                          int64_t panel_stride, int words) {
    for (int word = 0; word < words; ++word) {
        __m512i lanes[PANELS];
#pragma GCC unroll 8
        for (int panel = 0; panel < PANELS; ++panel) {
            const Word* from = right + panel * panel_stride + static_cast<int64_t>(word) * LANES;
            lanes[panel] = _mm512_loadu_si512(from);
            if (ROWS > 2) _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(left[row * left_stride + word]));
#pragma GCC unroll 8
            for (int panel = 0; panel < PANELS; ++panel)
                sums[row][panel] = Type::multiply_add(sums[row][panel], broadcast, lanes[panel]);
        }
    }
}

template <int ROWS, int PANELS>
inline void clear(__m512 (&sums)[ROWS][PANELS]) {
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
}

}  // namespace baton
