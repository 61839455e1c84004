// SPDX-License-Identifier: BSD-3-Clause
// What is fetched while the product runs. It computes and hardly reads memory; the other stages wait for memory and hardly
// compute. So while one chunk is multiplied, what they will touch is fetched into the second-level cache, a few lines after each
// register block.
#pragma once

#include "../common/product.h"
#include "../common/simd.h"
#include "patches.h"
#include "tiles.h"

namespace pywino::winograd {
namespace {

// Tensors of more are fetched: smaller ones are in the second-level cache.
constexpr int64_t kPrefetchBytes = int64_t(1) << 20;

// A row of pixels by its cache lines, or of planes by its planes: slots of `lines` cache lines.
struct Region {
  const char* at;
  int64_t slots, pitch;  // bytes from slot to slot
  int lines;

  // Of rows of `columns` pixels of T in `planes` planes.
  template <typename T>
  static Region of_planes(const T* at, int64_t columns, int64_t planes, int64_t plane) {
    const int64_t before = int64_t(reinterpret_cast<uintptr_t>(at) % 64);
    return {reinterpret_cast<const char*>(at) - before, planes, plane * int64_t(sizeof(T)),
            int(ceil_div<int64_t>(before + columns * int64_t(sizeof(T)), 64))};
  }

  // Columns [x, x + columns) of row y, as far as they lie inside; no slots where none does.
  template <typename T>
  static Region of(const Source<T>& source, int64_t image, int64_t y, int64_t x, int64_t columns) {
    const int64_t C = source.channels, x0 = max<int64_t>(0, x),
                  width = min(x + columns, source.width) - x0;
    if (!C || y < 0 || y >= source.height || width <= 0) return {};
    if (!source.channels_last)
      return of_planes(source.data + (image * C * source.height + y) * source.width + x0, width, C,
                       source.height * source.width);
    const T* row = source.data + ((image * source.height + y) * source.width + x0) * C;
    return {reinterpret_cast<const char*>(row),
            ceil_div<int64_t>(width * C * int64_t(sizeof(T)), 64), 64, 1};
  }
};

// Columns from the first to the last of what a piece's tiles touch, P of each.
PYWINO_INLINE int64_t span(const Piece& piece, int p) {
  return piece.offset(piece.count - 1) + int64_t(p - 1) * piece.dilation + 1;
}

// Of the rows of tiles: rows(piece, i) for i < Rows::kRows, pieces being those of rows.piece(first, most).
template <typename Rows>
class Prefetch {
 public:
  // Nothing to fetch.
  Prefetch() = default;

  // Of tiles [first, end), in `calls` calls of next().
  Prefetch(const Rows& rows, int64_t first, int64_t end, int64_t calls, int64_t depth)
      : rows_(rows), tile_(first), end_(end), quarters_(max<int64_t>(1, depth / 4)), left_(true) {
    int64_t slots = 0;
    for (int64_t t = first; t < end;) {
      const Piece piece = rows.piece(t, end - t);
      for (int i = 0; i < Rows::kRows; ++i) slots += rows(piece, i).slots;
      t += piece.count;
    }
    ahead_.rate = int(ceil_div(slots, calls * quarters_));
    advance();
  }

  // What to fetch during the next register block.
  PYWINO_INLINE const Ahead& next() {
    if (!left_) return ahead_;
    ahead_.next += ahead_.pitch * quarters_ * ahead_.rate;
    slots_ -= quarters_ * ahead_.rate;
    if (slots_ <= 0) advance();
    return ahead_;
  }

 private:
  // To the next row that there is.
  void advance() {
    for (;; ++i_) {
      if (i_ == Rows::kRows) {
        if (tile_ >= end_) break;
        piece_ = rows_.piece(tile_, end_ - tile_);
        tile_ += piece_.count;
        i_ = 0;
      }
      const Region region = rows_(piece_, i_);
      if (region.slots == 0) continue;
      ahead_.next = region.at;
      ahead_.pitch = region.pitch;
      ahead_.lines = region.lines;
      slots_ = region.slots;
      ++i_;
      return;
    }
    left_ = false;
    ahead_.rate = 0;
  }

  Rows rows_{};
  int64_t tile_ = 0, end_ = 0;
  int64_t quarters_ = 0,
          slots_ = 0;    // fours of channels in a register block; slots left in the row
  int i_ = Rows::kRows;  // the next row of the piece
  Piece piece_{};
  Ahead ahead_ = kNothing;
  bool left_ = false;
};

}  // namespace
}  // namespace pywino::winograd
