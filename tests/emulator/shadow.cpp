// SPDX-License-Identifier: BSD-3-Clause
#include "shadow.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "fiber.h"
#include "report.h"

namespace emu {

bool checking = false;

namespace {

// An access, in 64 bits: epoch 32, thread 10, clock 20, atomic 1, by the async proxy 1. 0 is "never".
using Record = uint64_t;
constexpr uint32_t kInFlight = 0xfffff;  // the clock of a copy that has not landed

Record record(Stamp when, bool atomic, bool async = false) {
  return uint64_t{when.epoch} << 32 | uint64_t(when.thread) << 22 | uint64_t{when.clock} << 2 |
         uint64_t{atomic} << 1 | uint64_t{async};
}
uint32_t epoch_of(Record r) { return static_cast<uint32_t>(r >> 32); }
int thread_of(Record r) { return r >> 22 & 0x3ff; }
uint32_t clock_of(Record r) { return r >> 2 & 0xfffff; }
bool is_atomic(Record r) { return r >> 1 & 1; }
bool is_async(Record r) { return r & 1; }

struct Cell {
  Record write, read, older_read;    // the two reads are of different threads
  uint32_t write_place, read_place;  // in the module's code
};

struct Region {
  char* base = nullptr;
  size_t bytes = 0;
  std::string name;
  bool global = false;
  bool read_only = false;
  bool initialised = false;
  int shift = 1;  // a cell is 1 << shift bytes
  std::vector<Cell> cells;

  bool holds(const char* p) const { return static_cast<size_t>(p - base) < bytes; }
  Cell& cell(const char* p) { return cells[static_cast<size_t>(p - base) >> shift]; }
};

Region dynamic_shared, static_shared;
std::vector<std::unique_ptr<Region>> buffers;
Region* last_buffer = nullptr;

char *module_low, *module_high;
char* arguments;
size_t arguments_bytes;

// epoch counts on from launch to launch, so that records never need to be wiped.
uint32_t epoch = 0, block_epoch = 0, launch_epoch = 0;
uint32_t clocks[kMaxThreads];
uint32_t seen[kMaxThreads][kMaxThreads];
bool clocks_moved = true;  // since the epoch began
Stamp proxy_fences[kMaxThreads];

uint32_t place(const void* pc) {
  return static_cast<uint32_t>(static_cast<const char*>(pc) - module_low);
}
const void* pc_of(uint32_t place) { return place ? module_low + place : nullptr; }

void resize(Region& r, char* base, size_t bytes) {
  r.base = base;
  r.bytes = bytes;
  const size_t cells = (bytes >> r.shift) + 1;
  if (r.cells.size() < cells) r.cells.resize(cells);
}

Region* find(const char* p) {
  if (dynamic_shared.holds(p)) return &dynamic_shared;
  if (static_shared.holds(p)) return &static_shared;
  if (last_buffer && last_buffer->holds(p)) return last_buffer;
  for (const auto& b : buffers) {
    if (b->holds(p)) return last_buffer = b.get();
  }
  return nullptr;
}

const char* verb(Access a) {
  return a == Access::read ? "read" : a == Access::write ? "write" : "atomic update";
}

// Is `r` unordered with what the current thread does now?
bool races(const Region& region, Record r, bool atomic) {
  if (!r || (atomic && is_atomic(r))) return false;
  if (epoch_of(r) == epoch) {
    const int t = thread_of(r);
    return t != current->number && seen[current->number][t] < clock_of(r);
  }
  // Another block of this launch; earlier epochs of this block are ordered, and so are earlier launches.
  return region.global && epoch_of(r) >= launch_epoch && epoch_of(r) < block_epoch;
}

void report_race(const Region& region, const char* p, int bytes, Access access, const void* pc,
                 Record r, uint32_t r_place, const char* r_verb) {
  const Thread& t = threads[thread_of(r)];
  const char* where = epoch_of(r) < block_epoch ? " of another block"
                      : t.warp == current->warp ? " of the same warp (is a __syncwarp missing?)"
                                                : "";
  report("RACE", pc, pc_of(r_place),
         "%s of %d bytes at %s+%zu, not ordered after the %s by thread (%u, %u, %u)%s",
         verb(access), bytes, region.name.c_str(), static_cast<size_t>(p - region.base), r_verb,
         t.index.x, t.index.y, t.index.z, where);
}

void check(Region& region, const char* p, int bytes, Access access, const void* pc) {
  const size_t offset = p - region.base;
  const char* name = region.name.c_str();
  if (offset + bytes > region.bytes) {
    fail("OUT-OF-BOUNDS", pc, nullptr, "%s of %d bytes at %s+%zu, which has %zu", verb(access),
         bytes, name, offset, region.bytes);
  }
  const bool power_of_two = (bytes & (bytes - 1)) == 0;
  if (power_of_two && bytes <= 16 && reinterpret_cast<uintptr_t>(p) % bytes) {
    fail("MISALIGNED", pc, nullptr, "%s of %d bytes at %s+%zu", verb(access), bytes, name, offset);
  }
  const bool writes = access != Access::read;
  const bool reads = access != Access::write;
  const bool atomic = access == Access::atomic;
  if (writes && region.read_only) {
    report("READ-ONLY", pc, nullptr, "%s at %s+%zu, an input", verb(access), name, offset);
  }
  const Record mine = record(now(), atomic);
  const uint32_t first_epoch = region.global ? 1 : block_epoch;
  for (size_t c = offset >> region.shift; c <= (offset + bytes - 1) >> region.shift; ++c) {
    Cell& cell = region.cells[c];
    if (cell.write != mine) {
      const bool written = epoch_of(cell.write) >= first_epoch;
      if (written && clock_of(cell.write) == kInFlight) {
        report("IN FLIGHT", pc, pc_of(cell.write_place),
               "%s at %s+%zu, which an asynchronous copy of thread %d has yet to fill",
               verb(access), name, offset, thread_of(cell.write));
        return;
      }
      if (races(region, cell.write, atomic)) {
        report_race(region, p, bytes, access, pc, cell.write, cell.write_place, "write");
      }
      if (reads && !written && !region.initialised) {
        report("UNINITIALISED", pc, nullptr, "%s of %d bytes at %s+%zu, not written in this %s",
               verb(access), bytes, name, offset, region.global ? "run" : "block");
        return;
      }
    }
    if (writes) {
      for (const Record read : {cell.read, cell.older_read}) {
        if (read != mine && races(region, read, atomic)) {
          report_race(region, p, bytes, access, pc, read, cell.read_place, "read");
          break;
        }
      }
      // An own write that others may not be ordered after yet stays visible behind an own atomic update.
      const bool hides_write = atomic && cell.write && !is_atomic(cell.write) &&
                               epoch_of(cell.write) == epoch &&
                               thread_of(cell.write) == current->number;
      if (!hides_write) cell = {mine, 0, 0, place(pc), 0};
    } else if (cell.read != mine) {
      if (thread_of(cell.read) != thread_of(mine)) cell.older_read = cell.read;
      cell.read = mine;
      cell.read_place = place(pc);
    }
  }
}

}  // namespace

void touch(const void* vp, int bytes, Access access, const void* pc) {
  const char* p = static_cast<const char*>(vp);
  if (on_stacks(p)) {
    if (stack_owner(p) != current->number) {
      fail("STACK", pc, nullptr, "%s of another thread's local variable", verb(access));
    }
    return;
  }
  if (Region* region = find(p)) {
    check(*region, p, bytes, access, pc);
    return;
  }
  if (static_cast<size_t>(p - arguments) < arguments_bytes) return;
  if (p >= module_low && p < module_high) return;  // constants of the kernel's file
  fail("OUT-OF-BOUNDS", pc, nullptr, "%s of %d bytes %s", verb(access), bytes, describe(p).c_str());
}

void touch_range(const void* p, size_t bytes, Access access, const void* pc) {
  const char* c = static_cast<const char*>(p);
  while (bytes) {
    const auto address = reinterpret_cast<uintptr_t>(c);
    int step = 16;
    while (static_cast<size_t>(step) > bytes || address % step) step /= 2;
    touch(c, step, access, pc);
    c += step;
    bytes -= step;
  }
}

void touch_async_read(const void* vp, int bytes, const void* pc) {
  const char* p = static_cast<const char*>(vp);
  touch(p, bytes, Access::read, pc);
  Region* region = find(p);
  if (!region) return;
  for (int i = 0; i < bytes; i += 1 << region->shift) {
    const Cell& cell = region->cell(p + i);
    const Stamp& fence = proxy_fences[thread_of(cell.write)];
    const Stamp& own_fence = proxy_fences[current->number];
    const bool fenced =
        epoch_of(cell.write) < std::max(fence.epoch, own_fence.epoch) ||
        (epoch_of(cell.write) == fence.epoch && clock_of(cell.write) <= fence.clock);
    if (!is_async(cell.write) && !fenced) {
      report("PROXY", pc, pc_of(cell.write_place),
             "asynchronous read of %s+%zu, which thread %d wrote with no fence_proxy_async() since",
             region->name.c_str(), static_cast<size_t>(p + i - region->base),
             thread_of(cell.write));
      return;
    }
  }
}

void begin_launch() { launch_epoch = epoch + 1; }

void begin_block() {
  clocks_moved = true;
  begin_epoch();
  block_epoch = epoch;
}

void begin_epoch() {
  ++epoch;
  if (!checking || !clocks_moved) return;
  clocks_moved = false;
  for (int i = 0; i < block.threads; ++i) {
    std::memset(seen[i], 0, block.threads * sizeof seen[i][0]);
    clocks[i] = seen[i][i] = 1;
  }
}

void meet(const int* who, int count) {
  if (!checking) return;
  static uint32_t all[kMaxThreads];
  std::memset(all, 0, block.threads * sizeof all[0]);
  for (int i = 0; i < count; ++i) {
    for (int t = 0; t < block.threads; ++t) all[t] = std::max(all[t], seen[who[i]][t]);
  }
  for (int i = 0; i < count; ++i) {
    const int t = who[i];
    std::memcpy(seen[t], all, block.threads * sizeof all[0]);
    seen[t][t] = ++clocks[t];
  }
  clocks_moved = true;
}

void release_to(uint32_t* to) {
  if (!checking) return;
  for (int t = 0; t < block.threads; ++t) to[t] = std::max(to[t], seen[current->number][t]);
  tick();
}

void acquire_from(const uint32_t* from) {
  if (!checking) return;
  uint32_t* mine = seen[current->number];
  for (int t = 0; t < block.threads; ++t) mine[t] = std::max(mine[t], from[t]);
  clocks_moved = true;
}

uint32_t current_epoch() { return epoch; }

void fence_async_proxy() {
  if (!checking) return;
  proxy_fences[current->number] = now();
  tick();
}

void host_write(const void* vp, size_t bytes) {
  const char* p = static_cast<const char*>(vp);
  Region* region = checking ? find(p) : nullptr;
  if (!region) return;
  ++epoch;
  for (size_t i = 0; i < bytes; i += size_t{1} << region->shift) {
    region->cell(p + i) = {record({epoch, 0, 0}, false), 0, 0, 0, 0};
  }
}

Stamp now() { return {epoch, current->number, clocks[current->number]}; }

void tick() {
  const int me = current->number;
  seen[me][me] = ++clocks[me];
  clocks_moved = true;
}

void mark_in_flight(const void* vp, int bytes, const void* pc) {
  const char* p = static_cast<const char*>(vp);
  Region* region = find(p);
  if (!region) return;  // touch() has said so
  for (int i = 0; i < bytes; i += 1 << region->shift) {
    region->cell(p + i) = {record({epoch, current->number, kInFlight}, false), 0, 0, place(pc), 0};
  }
}

void mark_landed(const void* vp, int bytes, Stamp when, bool by_async_proxy) {
  const char* p = static_cast<const char*>(vp);
  Region* region = find(p);
  if (!region) return;
  for (int i = 0; i < bytes; i += 1 << region->shift) {
    Cell& cell = region->cell(p + i);
    if (clock_of(cell.write) == kInFlight) cell.write = record(when, false, by_async_proxy);
  }
}

void set_shared(char* dynamic_base, size_t dynamic_bytes, char* static_base, size_t static_bytes) {
  dynamic_shared.name = "dynamic shared memory";
  static_shared.name = "static shared memory";
  resize(dynamic_shared, dynamic_base, dynamic_bytes);
  resize(static_shared, static_base, static_bytes);
}

void set_module(char* low, char* high) {
  module_low = low;
  module_high = high;
}

void set_arguments(void* p, size_t bytes) {
  arguments = static_cast<char*>(p);
  arguments_bytes = bytes;
}

std::string describe(const void* vp) {
  const char* p = static_cast<const char*>(vp);
  const Region* nearest = nullptr;
  size_t distance = ~size_t{0};
  bool before = false;
  const auto consider = [&](const Region& r) {
    const bool below = p < r.base;
    const size_t d = below ? r.base - p : p - (r.base + r.bytes);
    if (d < distance) {
      nearest = &r;
      distance = d;
      before = below;
    }
  };
  for (const auto& b : buffers) consider(*b);
  if (dynamic_shared.base) consider(dynamic_shared);
  if (!nearest || distance > size_t{1} << 30) return "at an address that is in no buffer";
  return "at " + std::to_string(distance) + " bytes " +
         (before ? "before the start of " : "behind the end of ") + nearest->name;
}

}  // namespace emu

using emu::Access;

// --- For the harness

extern "C" void emu_register(void* p, size_t bytes, const char* name, int read_only,
                             int initialised, int item_bytes) {
  auto region = std::make_unique<emu::Region>();
  region->name = name;
  region->global = true;
  region->read_only = read_only;
  region->initialised = initialised;
  region->shift = item_bytes > 1;
  region->base = static_cast<char*>(p);
  region->bytes = bytes;
  if (emu::checking) emu::resize(*region, region->base, bytes);
  emu::buffers.push_back(std::move(region));
}

extern "C" void emu_forget_buffers() {
  emu::buffers.clear();
  emu::last_buffer = nullptr;
}

// --- What the compiler calls

#define PYWINO_ON_ACCESS(name, bytes, access)                    \
  extern "C" void __tsan_##name(void* p) {                       \
    if (emu::checking && emu::current) {                         \
      emu::touch(p, bytes, access, __builtin_return_address(0)); \
    }                                                            \
  }
#define PYWINO_ON_ACCESSES(bytes)                              \
  PYWINO_ON_ACCESS(read##bytes, bytes, Access::read)           \
  PYWINO_ON_ACCESS(write##bytes, bytes, Access::write)         \
  PYWINO_ON_ACCESS(unaligned_read##bytes, bytes, Access::read) \
  PYWINO_ON_ACCESS(unaligned_write##bytes, bytes, Access::write)

PYWINO_ON_ACCESSES(1)
PYWINO_ON_ACCESSES(2)
PYWINO_ON_ACCESSES(4)
PYWINO_ON_ACCESSES(8)
PYWINO_ON_ACCESSES(16)

extern "C" void __tsan_read_range(void* p, size_t bytes) {
  if (emu::checking && emu::current) {
    emu::touch_range(p, bytes, Access::read, __builtin_return_address(0));
  }
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  if (emu::checking && emu::current) {
    emu::touch_range(p, bytes, Access::write, __builtin_return_address(0));
  }
}
// Host code's std::atomic<bool> and the guards of its static variables. Kernels have CUDA's functions for atomics.
extern "C" char __tsan_atomic8_load(const char* p, int order) { return __atomic_load_n(p, order); }
extern "C" void __tsan_atomic8_store(char* p, char value, int order) {
  __atomic_store_n(p, value, order);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
