// SPDX-License-Identifier: BSD-3-Clause
// Which pixels a tile covers.
//
// A dilation d splits the output into d x d interleaved grids that never meet: y = phase + d i. On each grid the convolution is
// an undilated one, so a tile is m x m outputs of one grid and its patch is a x a inputs, d apart. Tiles are numbered
// (image, row phase, row, column phase, column), the column fastest.
#pragma once

#include "../common/simd.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

// Tiles of one axis with n outputs. The first n % d phases have one output more than the others.
struct Axis {
  int64_t dilation, tile, wide, tiles_wide, tiles_narrow, total;

  Axis(int64_t n, int64_t d, int64_t m)
      : dilation(d),
        tile(m),
        wide(n % d),
        tiles_wide(ceil_div(ceil_div(n, d), m)),
        tiles_narrow(ceil_div(n / d, m)),
        total(wide * tiles_wide + (d - wide) * tiles_narrow) {}

  // First output of tile q, and how many tiles follow it in its phase (itself included).
  PYWINO_INLINE int64_t first(int64_t q, int64_t* left) const {
    const int64_t in_wide = wide * tiles_wide;
    const bool is_wide = q < in_wide;
    const int64_t per_phase = is_wide ? tiles_wide : tiles_narrow;
    if (!is_wide) q -= in_wide;
    const int64_t phase = q / per_phase, t = q - phase * per_phase;
    *left = per_phase - t;
    return phase + (is_wide ? 0 : wide) + dilation * tile * t;
  }
};

// Neighbouring tiles of one row: outputs start at (y, x) and tile s at x + s * tile * dilation.
struct Piece {
  int64_t image, y, x;
  int local, count;  // the first tile's number inside its chunk
};

struct Grid {
  Axis rows, columns;
  int64_t tiles_per_image, tiles;

  explicit Grid(const Geometry& g)
      : rows(g.out_h(), g.dil_h, g.tile),
        columns(g.out_w(), g.dil_w, g.tile),
        tiles_per_image(rows.total * columns.total),
        tiles(g.input.n * tiles_per_image) {}

  // The longest piece that starts at tile q, at most `most` tiles. With `strip`, it also ends where the next whole strip of
  // its row begins, so that all strips but the first start at the same alignment.
  PYWINO_INLINE Piece piece(int64_t q, int64_t most, int strip = 0) const {
    Piece p;
    p.image = q / tiles_per_image;
    q -= p.image * tiles_per_image;
    const int64_t row = q / columns.total;
    int64_t left;
    p.y = rows.first(row, &left);
    p.x = columns.first(q - row * columns.total, &left);
    if (strip) most = min<int64_t>(most, strip - p.x / (columns.dilation * columns.tile) % strip);
    p.count = int(min(left, most));
    p.local = 0;
    return p;
  }
};

// The tiles of a chunk in groups of nearly equal size, at most `most` each: no group is a small remainder.
struct Groups {
  int count, base, larger;  // the first `larger` groups have base + 1 tiles

  Groups(int tiles, int most)
      : count(ceil_div(tiles, most)), base(tiles / count), larger(tiles % count) {}
  PYWINO_INLINE int start(int g) const { return g * base + min(g, larger); }
  PYWINO_INLINE int size(int g) const { return base + (g < larger); }
  PYWINO_INLINE int of(int tile) const {
    const int in_larger = larger * (base + 1);
    return tile < in_larger ? tile / (base + 1) : larger + (tile - in_larger) / base;
  }
};

}  // namespace
}  // namespace pywino::winograd
