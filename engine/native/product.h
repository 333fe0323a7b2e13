// Rows times packed weights.
//
// Weights [outputs, inputs] are packed into panels of 16 outputs: [outputs / 16][words of inputs][16], zeros behind the
// last output and the last input. A thread owns a range of panels and reads each once; how many rows and panels a tile
// has is a matter of speed alone.
#pragma once

#include "tile.h"

namespace baton {

constexpr int TILE_ROWS = 6;
constexpr int TILE_PANELS = 4;
// With one or two rows it is reading that takes the time: more panels are more streams in flight.
constexpr int FEW_ROWS = 2;
constexpr int FEW_ROWS_PANELS = 8;

struct PanelRange {
    int begin, end;
};

// A thread's share, in groups of `group` panels that must stay together.
inline PanelRange share_of(int panels, int group, int thread, int threads) {
    const int groups = panels / group;
    return {groups * thread / threads * group, groups * (thread + 1) / threads * group};
}

struct Rows {
    const Word* words;
    int64_t stride;
    int count;
};

// Packed weights: `words` of inputs per panel.
struct Panels {
    const Word* packed;
    int words;

    const Word* at(int panel) const { return packed + static_cast<int64_t>(panel) * words * LANES; }
};

template <class Type, int ROWS, int PANELS, class Finish>
void finish_tile(const Rows& rows, const Panels& panels, int row, int panel, const Finish& finish) {
    __m512 sums[ROWS][PANELS];
    clear(sums);
    multiply_tile<Type>(sums, rows.words + row * rows.stride, rows.stride, panels.at(panel),
                        static_cast<int64_t>(panels.words) * LANES, panels.words);
    for (int index = 0; index < ROWS; ++index) finish(row + index, panel, sums[index]);
}

template <class Type, int PANELS, class Finish>
void finish_rows(const Rows& rows, const Panels& panels, int panel, const Finish& finish) {
    const int tiles = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
    for (int tile = 0, row = 0; tile < tiles; ++tile) {
        const int end = static_cast<int>(static_cast<int64_t>(rows.count) * (tile + 1) / tiles);
        switch (end - row) {
            case 1: finish_tile<Type, 1, PANELS>(rows, panels, row, panel, finish); break;
            case 2: finish_tile<Type, 2, PANELS>(rows, panels, row, panel, finish); break;
            case 3: finish_tile<Type, 3, PANELS>(rows, panels, row, panel, finish); break;
            case 4: finish_tile<Type, 4, PANELS>(rows, panels, row, panel, finish); break;
            case 5: finish_tile<Type, 5, PANELS>(rows, panels, row, panel, finish); break;
            default: finish_tile<Type, TILE_ROWS, PANELS>(rows, panels, row, panel, finish);
        }
        row = end;
    }
}

template <class Type, class Finish>
void finish_few_rows(const Rows& rows, const Panels& panels, int panel, const Finish& finish) {
    if (rows.count == 1)
        finish_tile<Type, 1, FEW_ROWS_PANELS>(rows, panels, 0, panel, finish);
    else
        finish_tile<Type, FEW_ROWS, FEW_ROWS_PANELS>(rows, panels, 0, panel, finish);
}

// Calls finish(row, first panel, sums [PANELS]) for all rows and the panels of `range`; PANELS is even, but for a last
// odd panel.
template <class Type, class Finish>
void multiply(const Rows& rows, const Panels& panels, PanelRange range, const Finish& finish) {
    int panel = range.begin;
    if (rows.count <= FEW_ROWS)
        for (; panel + FEW_ROWS_PANELS <= range.end; panel += FEW_ROWS_PANELS)
            finish_few_rows<Type>(rows, panels, panel, finish);
    for (; panel + TILE_PANELS <= range.end; panel += TILE_PANELS)
        finish_rows<Type, TILE_PANELS>(rows, panels, panel, finish);
    for (; panel + 2 <= range.end; panel += 2) finish_rows<Type, 2>(rows, panels, panel, finish);
    if (panel < range.end) finish_rows<Type, 1>(rows, panels, panel, finish);
}

}  // namespace baton
