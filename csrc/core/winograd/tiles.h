// SPDX-License-Identifier: BSD-3-Clause
// Which pixels a tile covers.
//
// A dilation d splits the output into d x d interleaved grids that never meet: y = phase + d i. On each grid the convolution is
// an undilated one, so a tile is m x m outputs of one grid and its patch is a x a inputs, d apart. Tiles are numbered
// (image, row phase, row, column, column phase), the column phase fastest: the d tiles of one column cover m d neighbouring
// pixels, a block, so that tiles in their order walk along a row of pixels at any dilation.
#pragma once

#include "../common/simd.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

template <int M>
struct Tile {
  static constexpr int m = M;
};

// use(Tile<m>{}) for m x m outputs a tile.
template <typename Use>
Status with_tile(int m, const Use& use) {
  switch (m) {
    case 2: return use(Tile<2>{});
    case 4: return use(Tile<4>{});
    case 6: return use(Tile<6>{});
  }
  return Status::unsupported;
}

// Tiles of the rows, phase by phase. The first n % d phases have one output more than the others.
struct Rows {
  int64_t dilation, tile, wide, tiles_wide, tiles_narrow, total;

  Rows(int64_t n, int64_t d, int64_t m)
      : dilation(d),
        tile(m),
        wide(n % d),
        tiles_wide(ceil_div(ceil_div(n, d), m)),
        tiles_narrow(ceil_div(n / d, m)),
        total(wide * tiles_wide + (d - wide) * tiles_narrow) {}

  // First output of tile q.
  PYWINO_INLINE int64_t first(int64_t q) const {
    const int64_t in_wide = wide * tiles_wide;
    const bool is_wide = q < in_wide;
    const int64_t per_phase = is_wide ? tiles_wide : tiles_narrow;
    if (!is_wide) q -= in_wide;
    const int64_t phase = q / per_phase, t = q - phase * per_phase;
    return phase + (is_wide ? 0 : wide) + dilation * tile * t;
  }
};

// Tiles of the columns, block by block. The last block has fewer tiles if it has fewer than d outputs.
struct Columns {
  int64_t dilation, tile, total;

  Columns(int64_t n, int64_t d, int64_t m)
      : dilation(d), tile(m), total(n / (m * d) * d + min(d, n % (m * d))) {}

  // First output of tile q.
  PYWINO_INLINE int64_t first(int64_t q) const {
    return dilation == 1 ? q * tile : q / dilation * (tile * dilation) + q % dilation;
  }
};

// Columns of the strip in which planes (NCHW) are turned into pixels, 16 lanes each. Up to half of them are used for pixels that
// all neighbour one another: 8 rows x 64 columns x 16 lanes = 32 KB.
constexpr int kStrip = 128;
constexpr int kNear = kStrip / 2;
constexpr int kSegment = 16;  // most pixels of a segment, below

// Tiles that follow one another in one row of tiles; tile s has its first output at (y, x + offset(s)).
struct Piece {
  int64_t image, y, x;
  int local, count;  // the first tile's number inside its chunk
  int phase;         // the first tile's
  int dilation, tile;
  bool last;  // ends with its row

  PYWINO_INLINE int64_t offset(int s) const {
    if (dilation == 1) return s * tile;
    const int q = phase + s;
    return int64_t(q / dilation) * tile * dilation + q % dilation - phase;
  }
};

// Which pixels the columns of a strip hold for a piece, P of every tile, a dilation apart: `segments` of `length` neighbouring
// pixels each, `pitch` apart from x on. Column j of tile s is the strip's column at(s) + j * step.
//   one segment     all pixels from the first to the last, where blocks are small
//   P segments      one for each j; tile s is the s-th pixel of each
struct Strip {
  const Piece& piece;
  int segments, length, step;

  Strip(const Piece& piece, int p, bool together)
      : piece(piece),
        segments(together ? 1 : p),
        length(int(together ? piece.offset(piece.count - 1) + (p - 1) * piece.dilation + 1
                            : piece.count)),
        step(together ? piece.dilation : piece.count) {}
  PYWINO_INLINE int at(int s) const { return int(segments == 1 ? piece.offset(s) : s); }
  PYWINO_INLINE int64_t pixel(int segment) const { return int64_t(segment) * piece.dilation; }
};

// Whether a block, with its patches, has few enough columns to lie in a strip as neighbours.
PYWINO_INLINE bool blocks_are_small(int64_t dilation, int64_t tile) {
  return (tile + 2) * dilation <= kNear;
}

// For reading: pixels between are read for nothing.
PYWINO_INLINE Strip read_strip(const Piece& piece, int p) {
  return Strip(piece, p, blocks_are_small(piece.dilation, piece.tile));
}

// For writing: pixels of other tiles must stay, so neighbours must be whole blocks.
PYWINO_INLINE Strip write_strip(const Piece& piece) {
  const bool whole = piece.phase == 0 && (piece.last || piece.count % piece.dilation == 0);
  return Strip(piece, piece.tile, whole && blocks_are_small(piece.dilation, piece.tile));
}

// All tiles, or those of a mask: tile q is the q-th of its list.
struct Grid {
  Rows rows;
  Columns columns;
  int64_t tiles_per_image, tiles;
  const int32_t* list;
  int strip;  // most tiles of a piece for a strip

  explicit Grid(const Geometry& g, const Mask* mask = nullptr)
      : rows(g.out_h(), g.dil_h, g.tile),
        columns(g.out_w(), g.dil_w, g.tile),
        tiles_per_image(rows.total * columns.total),
        tiles(mask ? mask->count : g.input.n * tiles_per_image),
        list(mask ? mask->tiles : nullptr),
        strip(tiles_in_strip(int(min<int64_t>(g.dil_w, kStrip)), g.tile)) {}

  PYWINO_INLINE int64_t number(int64_t q) const { return list ? list[q] : q; }

  // The longest piece that starts at tile q, at most `most` tiles.
  PYWINO_INLINE Piece piece(int64_t q, int64_t most) const {
    if (list) {
      int64_t neighbours = 1;
      while (neighbours < most && list[q + neighbours] == list[q] + neighbours) ++neighbours;
      most = neighbours;
      q = list[q];
    }
    Piece p;
    p.image = q / tiles_per_image;
    q -= p.image * tiles_per_image;
    const int64_t row = q / columns.total, column = q - row * columns.total;
    p.y = rows.first(row);
    p.x = columns.first(column);
    p.phase = int(column % columns.dilation);
    p.dilation = int(columns.dilation);
    p.tile = int(columns.tile);
    p.local = 0;
    p.count = int(min(columns.total - column, most));
    p.last = column + p.count == columns.total;
    return p;
  }

  // The longest that fits a strip. It is whole blocks or lies in one block, and ends where the next strip of its row begins, so
  // that all strips but the first start at the same alignment.
  PYWINO_INLINE Piece strip_piece(int64_t q, int64_t most) const {
    Piece p = piece(q, most);
    const int64_t d = columns.dilation, column = number(q) % tiles_per_image % columns.total,
                  left = columns.total - column;
    const int64_t place = blocks_are_small(d, columns.tile) ? column % strip : p.phase % strip;
    int64_t count = min<int64_t>(p.count, strip - place);
    if (p.phase || count < d)
      count = min(count, d - p.phase);
    else if (count < left)
      count -= count % d;
    p.count = int(count);
    p.last = count == left;
    return p;
  }

 private:
  // Small blocks: as many as fit, in whole vectors of outputs if that can be. Large ones: a segment.
  static int tiles_in_strip(int d, int m) {
    if (!blocks_are_small(d, m)) return kSegment;
    const int most = (kNear - 2 * d) / (m * d);
    for (int blocks = most; blocks > 0; --blocks)
      if (blocks * m * d % kSegment == 0) return blocks * d;
    return most * d;
  }
};

// The tiles of a chunk in groups of nearly equal size, at most `most` each: no group is a small remainder. even: of equal size,
// where the last one counts tiles behind the chunk.
struct Groups {
  int tiles, count, base, larger;  // the first `larger` groups have base + 1 tiles

  Groups(int tiles, int most, bool even = false)
      : tiles(tiles),
        count(ceil_div(tiles, most)),
        base(even ? ceil_div(tiles, count) : tiles / count),
        larger(even ? 0 : tiles % count) {}
  PYWINO_INLINE int start(int g) const { return g * base + min(g, larger); }
  PYWINO_INLINE int size(int g) const { return base + (g < larger); }
  PYWINO_INLINE int of(int tile) const {
    const int in_larger = larger * (base + 1);
    return tile < in_larger ? tile / (base + 1) : larger + (tile - in_larger) / base;
  }
};

}  // namespace
}  // namespace pywino::winograd
