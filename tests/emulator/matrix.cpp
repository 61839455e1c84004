// SPDX-License-Identifier: BSD-3-Clause
#include "matrix.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "collectives.h"
#include "fiber.h"
#include "interface.h"
#include "memory.h"
#include "report.h"
#include "shadow.h"
#include "tensor_map.h"

namespace emu {
namespace {

// --- Numbers

float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

const std::array<float, 65536> float_of_half = [] {
  std::array<float, 65536> table;
  for (unsigned i = 0; i < table.size(); ++i) {
    __half_raw half;
    half.x = static_cast<unsigned short>(i);
    table[i] = __half2float(half);
  }
  return table;
}();

// The number in the low 16 bits.
float from_16_bits(int type, uint32_t bits) {
  return type == BF16 ? float_of_bits(bits << 16) : float_of_half[bits & 0xffff];
}

float from_tf32(uint32_t bits) { return float_of_bits(bits & ~0x1fffu); }

// --- Fragments (PTX ISA, "Matrix Fragments for mma"): which lane holds what. Lane 4 g + q.

constexpr int kRows = 16;    // of A and D
constexpr int kColumns = 8;  // of B and D, in mma.sync
constexpr int kMaxDepth = 32;

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
  const float* c;
  uint32_t metadata;
};

using Row = float __attribute__((vector_size(kColumns * sizeof(float))));

struct Tiles {
  float a[kRows][kMaxDepth];
  Row b[kMaxDepth];
  Row d[kRows];
};

const MmaOperands& operands_of(void** all, int lane) {
  return *static_cast<MmaOperands*>(all[lane]);
}

// A register of A holds two 16-bit items of a row, or one TF32; registers go down the rows first: rows g and g + 8 of the
// first eight (four) columns, then of the next.
void unpack_a(int type, int depth, const uint32_t* a, int lane, float (*out)[kMaxDepth]) {
  const int g = lane / 4, q = lane % 4;
  const int per_register = type == TF32 ? 1 : 2;
  const int registers = kRows * depth / kLanes / per_register;
  for (int r = 0; r < registers; ++r) {
    const int row = g + 8 * (r % 2);
    const int column = 4 * per_register * (r / 2) + per_register * q;
    if (type == TF32) {
      out[row][column] = from_tf32(a[r]);
    } else {
      out[row][column] = from_16_bits(type, a[r]);
      out[row][column + 1] = from_16_bits(type, a[r] >> 16);
    }
  }
}

void unpack_b(int type, int depth, const uint32_t* b, int lane, Row* out) {
  const int g = lane / 4, q = lane % 4;
  const int per_register = type == TF32 ? 1 : 2;
  for (int r = 0; r < depth / 4 / per_register; ++r) {
    const int row = 4 * per_register * r + per_register * q;
    if (type == TF32) {
      out[row][g] = from_tf32(b[r]);
    } else {
      out[row][g] = from_16_bits(type, b[r]);
      out[row + 1][g] = from_16_bits(type, b[r] >> 16);
    }
  }
}

int d_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
int d_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

void load_c(void** all, Tiles& t) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i)
      t.d[d_row(lane, i)][d_column(lane, i)] = operands_of(all, lane).c[i];
  }
}

void store_d(void** all, const Tiles& t) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i)
      operands_of(all, lane).d[i] = t.d[d_row(lane, i)][d_column(lane, i)];
  }
}

}  // namespace

void mma(int type, int depth, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaOperands mine = {d, a, b, c, 0};
  const int kind = kMma + 100 * type + 1000 * depth;
  collective(kind, kAllLanes, &mine, __builtin_return_address(0), [&](void** all) {
    Tiles t;
    load_c(all, t);
    for (int lane = 0; lane < kLanes; ++lane) {
      unpack_a(type, depth, operands_of(all, lane).a, lane, t.a);
      unpack_b(type, depth, operands_of(all, lane).b, lane, t.b);
    }
    for (int k = 0; k < depth; ++k) {
      for (int i = 0; i < kRows; ++i) t.d[i] += t.a[i][k] * t.b[k];
    }
    store_d(all, t);
  });
}

// A is stored with half of its columns: stored column 2 j + s is one of columns 4 j ... 4 j + 3 of its row, which one say
// two bits of metadata. Lane 4 g + 2 * selector + h brings those of columns 16 h ... 16 h + 15: bits 0-15 for row g, bits
// 16-31 for row g + 8.
void mma_sp(int type, int depth, float* d, const uint32_t* a, const uint32_t* b, const float* c,
            uint32_t metadata, int selector) {
  MmaOperands mine = {d, a, b, c, metadata};
  const void* pc = __builtin_return_address(0);
  const int kind = kMmaSparse + 100 * type + 1000 * selector;
  collective(kind, kAllLanes, &mine, pc, [&](void** all) {
    Tiles t;
    load_c(all, t);
    for (int lane = 0; lane < kLanes; ++lane) {
      unpack_a(type, depth / 2, operands_of(all, lane).a, lane, t.a);
      unpack_b(type, depth, operands_of(all, lane).b, lane, t.b);
    }
    for (int row = 0; row < kRows; ++row) {
      int previous = -1;
      for (int stored = 0; stored < depth / 2; ++stored) {
        const int lane = 4 * (row % 8) + 2 * selector + stored / 8;
        const uint32_t bits = operands_of(all, lane).metadata >> (16 * (row / 8));
        const int index = bits >> 2 * (stored % 8) & 3;
        if (stored % 2 && index <= previous) {
          report("MMA.SP", pc, nullptr, "metadata of row %d: %d, %d do not ascend", row, previous,
                 index);
        }
        previous = index;
        t.d[row] += t.a[row][stored] * t.b[4 * (stored / 2) + index];
      }
    }
    store_d(all, t);
  });
}

// --- wgmma: each of the four warps computes 16 of the 64 rows, on its own time

namespace {

constexpr int kDepthBytes = 32;  // 16 items of 16 bits, 8 of TF32
constexpr int kMaxWgmmaColumns = 256;

// A matrix in shared memory, rows of k-contiguous items ("K-major"), as its descriptor says (PTX ISA, "Matrix descriptor").
// Groups of 8 rows lie stride_bytes apart. With a swizzle of b bytes a row is b bytes long, and k advances inside it;
// without, the matrix is made of 8 x 16-byte blocks, leading_bytes apart along k.
struct Descriptor {
  uint32_t start, leading_bytes, stride_bytes;
  Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading_bytes((bits >> 16 & 0x3fff) << 4),
        stride_bytes((bits >> 32 & 0x3fff) << 4) {
    constexpr Swizzle kSwizzles[] = {Swizzle::none, Swizzle::bytes128, Swizzle::bytes64,
                                     Swizzle::bytes32};
    swizzle = kSwizzles[bits >> 62];
  }

  // Where 16 bytes begin: half 0 or 1 of the kDepthBytes of a row.
  uint32_t address(int row, int half) const {
    const uint32_t group = start + row / 8 * stride_bytes;
    if (swizzle == Swizzle::none) return group + row % 8 * 16 + half * leading_bytes;
    const uint32_t pitch = 16u << static_cast<int>(swizzle);
    return swizzled(group + row % 8 * pitch + half * 16, swizzle);
  }
};

// The registers of a warp's accumulators while wgmmas on them are in flight. The kernel's own hold NaN meanwhile.
struct Accumulators {
  float* registers[kLanes];
  int columns;
  std::vector<float> values;  // [row][column]
  int in_flight = 0;
};

struct Wgmma {
  int type;
  int columns;
  bool scale_d;
  bool a_in_registers;
  uint32_t a[kLanes][4];
  uint64_t a_descriptor, b_descriptor;
  std::shared_ptr<Accumulators> accumulators;
  const void* pc;
};

struct WarpState {
  bool fenced = false;
  std::vector<std::shared_ptr<Accumulators>> accumulators;
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> committed;
};
WarpState warps[kMaxWarps];

int wgmma_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
int wgmma_column(int lane, int i) { return 8 * (i / 4) + lane % 4 * 2 + i % 2; }

std::shared_ptr<Accumulators> take_registers(WarpState& warp, float* const* registers, int columns,
                                             const void* pc) {
  for (const auto& a : warp.accumulators) {
    if (a->registers[0] != registers[0]) continue;
    if (a->columns != columns) {
      fail("WGMMA", pc, nullptr, "%d columns on accumulators that are in flight with %d", columns,
           a->columns);
    }
    return a;
  }
  auto taken = std::make_shared<Accumulators>();
  taken->columns = columns;
  taken->values.resize(kRows * columns);
  for (int lane = 0; lane < kLanes; ++lane) {
    taken->registers[lane] = registers[lane];
    for (int i = 0; i < columns / 2; ++i) {
      taken->values[wgmma_row(lane, i) * columns + wgmma_column(lane, i)] = registers[lane][i];
    }
    std::memset(registers[lane], kPoison, columns / 2 * sizeof(float));
  }
  warp.accumulators.push_back(taken);
  return taken;
}

void give_back_registers(WarpState& warp, const std::shared_ptr<Accumulators>& taken,
                         const void* pc) {
  const int columns = taken->columns;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &taken->registers[lane][i], sizeof bits);
      if (bits != 0xffffffffu) {
        report("WGMMA", pc, nullptr, "accumulator %d of lane %d was written while in flight", i,
               lane);
      }
      taken->registers[lane][i] =
          taken->values[wgmma_row(lane, i) * columns + wgmma_column(lane, i)];
    }
  }
  std::erase(warp.accumulators, taken);
}

int first_row(int warp) { return warp % 4 * kRows; }

void check_reads(const Wgmma& w) {
  if (!checking) return;
  const auto read = [&](const Descriptor& matrix, int row) {
    for (int half : {0, 1})
      touch_async_read(shared_at(matrix.address(row, half), 16, w.pc), 16, w.pc);
  };
  const Descriptor a(w.a_descriptor), b(w.b_descriptor);
  if (!w.a_in_registers) {
    for (int i = 0; i < kRows; ++i) read(a, first_row(current->warp) + i);
  }
  for (int j = 0; j < w.columns; ++j) read(b, j);
}

// Row `row` of a matrix in shared memory: its kDepthBytes as floats.
void read_row(int type, const Descriptor& matrix, int row, const void* pc, float* out) {
  for (int half : {0, 1}) {
    const char* p = shared_at(matrix.address(row, half), 16, pc);
    if (type == TF32) {
      uint32_t bits[4];
      std::memcpy(bits, p, sizeof bits);
      for (uint32_t b : bits) *out++ = from_tf32(b);
    } else {
      uint16_t bits[8];
      std::memcpy(bits, p, sizeof bits);
      for (uint16_t b : bits) *out++ = from_16_bits(type, b);
    }
  }
}

void compute(const Wgmma& w) {
  const int depth = w.type == TF32 ? 8 : 16;
  const Descriptor a_matrix(w.a_descriptor), b_matrix(w.b_descriptor);
  float a[kRows][kMaxDepth];
  static float b[kMaxDepth][kMaxWgmmaColumns];
  if (w.a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) unpack_a(w.type, depth, w.a[lane], lane, a);
  } else {
    for (int i = 0; i < kRows; ++i) {
      read_row(w.type, a_matrix, first_row(current->warp) + i, w.pc, a[i]);
    }
  }
  for (int j = 0; j < w.columns; ++j) {
    float column[kMaxDepth];
    read_row(w.type, b_matrix, j, w.pc, column);
    for (int k = 0; k < depth; ++k) b[k][j] = column[k];
  }
  float* __restrict__ d = w.accumulators->values.data();
  if (!w.scale_d) std::fill_n(d, kRows * w.columns, 0.f);
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < w.columns; ++j) d[i * w.columns + j] += a[i][k] * b[k][j];
    }
  }
}

}  // namespace

void wgmma_fence() {
  collective(kWgmmaFence, kAllLanes, nullptr, __builtin_return_address(0),
             [](void**) { warps[current->warp].fenced = true; });
}

void wgmma(int type, int columns, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, int scale_d) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
  } mine = {d, a, a_descriptor, b_descriptor};
  const void* pc = __builtin_return_address(0);
  const int kind = kWgmma + 100 * type + 1000 * columns;
  collective(kind, kAllLanes, &mine, pc, [&](void** all) {
    WarpState& warp = warps[current->warp];
    if (current->warp / 4 * 4 + 4 > block.warps) {
      fail("WGMMA", pc, nullptr, "warp %d is not one of four", current->warp);
    }
    if (!warp.fenced) report("WGMMA", pc, nullptr, "no wgmma_fence() before the first wgmma");
    Wgmma w = {type,    columns, scale_d != 0, a != nullptr, {}, a_descriptor, b_descriptor,
               nullptr, pc};
    float* registers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& o = *static_cast<Operands*>(all[lane]);
      if (o.a_descriptor != a_descriptor || o.b_descriptor != b_descriptor) {
        fail("WGMMA", pc, nullptr, "lane %d brings descriptors of its own", lane);
      }
      registers[lane] = o.d;
      if (a) std::copy_n(o.a, 4, w.a[lane]);
    }
    check_reads(w);
    w.accumulators = take_registers(warp, registers, columns, pc);
    ++w.accumulators->in_flight;
    warp.open.push_back(std::move(w));
  });
}

void wgmma_commit() {
  collective(kWgmmaCommit, kAllLanes, nullptr, __builtin_return_address(0), [](void**) {
    WarpState& warp = warps[current->warp];
    warp.committed.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

void wgmma_wait(int keep) {
  collective(kWgmmaWait, kAllLanes, nullptr, __builtin_return_address(0), [&](void**) {
    WarpState& warp = warps[current->warp];
    while (static_cast<int>(warp.committed.size()) > keep) {
      for (const Wgmma& w : warp.committed.front()) {
        check_reads(w);  // again: nobody may have written in between
        compute(w);
        if (--w.accumulators->in_flight == 0) give_back_registers(warp, w.accumulators, w.pc);
      }
      warp.committed.pop_front();
    }
  });
}

void begin_block_matrix() {
  for (WarpState& warp : warps) warp = WarpState{};
}

void end_block_matrix() {
  for (const WarpState& warp : warps) {
    if (warp.accumulators.empty()) continue;
    const void* pc = warp.open.empty() ? nullptr : warp.open.front().pc;
    for (const auto& group : warp.committed) {
      if (!group.empty()) pc = group.front().pc;
    }
    report("NOT WAITED FOR", pc, nullptr, "the block ends with a wgmma in flight");
    return;
  }
}

}  // namespace emu
