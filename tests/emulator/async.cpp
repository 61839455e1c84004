// SPDX-License-Identifier: BSD-3-Clause
#include "async.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "interface.h"
#include "memory.h"
#include "report.h"
#include "shadow.h"
#include "tensor_map.h"

namespace emu {
namespace {

// Work that a thread has issued: what it has not committed yet, and its groups, oldest first.
template <class Item>
struct Groups {
  std::vector<Item> open;
  std::deque<std::vector<Item>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  template <class Complete>
  void retire(int keep, Complete complete) {
    while (static_cast<int>(committed.size()) > keep) {
      for (Item& item : committed.front()) complete(item);
      committed.pop_front();
    }
  }
  const Item* oldest() const {
    for (const auto& group : committed) {
      if (!group.empty()) return &group.front();
    }
    return open.empty() ? nullptr : &open.front();
  }
  void clear() {
    open.clear();
    committed.clear();
  }
};

// --- cp.async

struct Copy {
  char* destination;
  const char* source;
  int bytes, source_bytes;
  const void* pc;
};
Groups<Copy> copies[kMaxThreads];

// --- mbarrier

struct Mbarrier {
  uint32_t count, pending;
  int initialised_by;   // a thread
  bool fenced = false;  // by its fence_mbarrier_init(): TMA sees it
  uint32_t phase = 0;
  long bytes = 0;  // expected and not here yet
  std::vector<int> waiting;
  // What has been released to the phase that goes on, and to the last that is complete, in epoch `epoch`.
  std::vector<uint32_t> releasing, released;
  uint32_t epoch = 0;
};
std::map<uint32_t, Mbarrier> mbarriers;

Mbarrier& find_mbarrier(uint32_t address, const void* pc) {
  const auto entry = mbarriers.find(address);
  if (entry == mbarriers.end()) {
    fail("MBARRIER", pc, nullptr, "no mbarrier was initialised at shared address %#x", address);
  }
  // As an atomic access: it must be ordered after the initialisation.
  if (checking) touch(shared_at(address, 8, pc), 8, Access::atomic, pc);
  Mbarrier& b = entry->second;
  if (b.epoch != current_epoch()) {  // everything of earlier epochs is ordered already
    b.epoch = current_epoch();
    b.releasing.assign(kMaxThreads, 0);
    b.released.assign(kMaxThreads, 0);
  }
  return b;
}

void complete_phase_if_due(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
  b.released = b.releasing;
  for (int t : b.waiting) make_ready(t);
  b.waiting.clear();
}

void arrive(Mbarrier& b, const void* pc) {
  if (!b.pending) fail("MBARRIER", pc, nullptr, "more arrivals than the count, %u", b.count);
  release_to(b.releasing.data());
  --b.pending;
  complete_phase_if_due(b);
}

// --- TMA

struct Load {
  TensorMap map;
  int coordinates[kMaxRank];
  uint32_t address, barrier;
  const void* pc;
  Stamp issued;
  std::vector<uint32_t> clocks;  // what its issue is ordered after
};
std::deque<Load> loads;

struct Store {
  TensorMap map;
  int coordinates[kMaxRank];
  uint32_t address;
  const void* pc;
};
Groups<Store> stores[kMaxThreads];

const TensorMap& decode(const void* map, int rank, uint32_t address, const void* pc) {
  const auto& decoded = *static_cast<const TensorMap*>(map);
  if (decoded.magic != kTensorMapMagic) {
    fail("TMA", pc, nullptr, "the tensor map at %p was not made by cuTensorMapEncodeTiled", map);
  }
  if (decoded.rank != rank) {
    fail("TMA", pc, nullptr, "%d coordinates for a tensor map of rank %d", rank, decoded.rank);
  }
  const uint32_t alignment = decoded.swizzle == Swizzle::bytes128 ? 1024 : 128;
  if (address % alignment) {
    fail("MISALIGNED", pc, nullptr, "TMA with shared address %#x, which must be a multiple of %u",
         address, alignment);
  }
  return decoded;
}

void read_for_store(const Store& s) {
  if (!checking) return;
  const char* tile = shared_at(s.address, s.map.box_bytes(), s.pc);
  for (int i = 0; i < s.map.box_bytes(); i += 16) touch_async_read(tile + i, 16, s.pc);
}

}  // namespace

// --- cp.async

void cp_async(uint32_t address, const void* vsource, int bytes, int source_bytes) {
  const void* pc = __builtin_return_address(0);
  const char* source = static_cast<const char*>(vsource);
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("CP.ASYNC", pc, nullptr, "%d bytes to copy, of %d", source_bytes, bytes);
  }
  if (address % bytes || reinterpret_cast<uintptr_t>(source) % bytes) {
    fail("MISALIGNED", pc, nullptr, "cp.async of %d bytes from %p to shared address %#x", bytes,
         vsource, address);
  }
  char* destination = shared_at(address, bytes, pc);
  if (checking) {
    touch(destination, bytes, Access::write, pc);
    mark_in_flight(destination, bytes, pc);
    touch_range(source, source_bytes, Access::read, pc);
  }
  std::memset(destination, kPoison, bytes);
  copies[current->number].open.push_back({destination, source, bytes, source_bytes, pc});
}

void cp_async_commit() { copies[current->number].commit(); }

void cp_async_wait(int keep) {
  copies[current->number].retire(keep, [](const Copy& c) {
    const OnBehalfOf instruction(c.pc);
    std::memcpy(c.destination, c.source, c.source_bytes);
    std::memset(c.destination + c.source_bytes, 0, c.bytes - c.source_bytes);
    if (checking) mark_landed(c.destination, c.bytes, now(), false);
  });
}

// --- mbarrier

void mbar_init(uint32_t address, uint32_t count) {
  const void* pc = __builtin_return_address(0);
  if (address % 8) fail("MISALIGNED", pc, nullptr, "mbarrier at shared address %#x", address);
  if (count < 1 || count >= 1 << 20) fail("MBARRIER", pc, nullptr, "a count of %u", count);
  const char* p = shared_at(address, 8, pc);
  if (checking) touch(p, 8, Access::write, pc);
  Mbarrier b;
  b.count = b.pending = count;
  b.initialised_by = current->number;
  mbarriers[address] = b;
}

void fence_mbarrier_init() {
  for (auto& [address, b] : mbarriers) b.fenced |= b.initialised_by == current->number;
}

void mbar_arrive(uint32_t address) {
  const void* pc = __builtin_return_address(0);
  arrive(find_mbarrier(address, pc), pc);
}

void mbar_expect_tx(uint32_t address, uint32_t bytes) {
  const void* pc = __builtin_return_address(0);
  Mbarrier& b = find_mbarrier(address, pc);
  b.bytes += bytes;
  arrive(b, pc);
}

void mbar_wait(uint32_t address, uint32_t parity) {
  const void* pc = __builtin_return_address(0);
  if (parity > 1) fail("MBARRIER", pc, nullptr, "a parity of %u", parity);
  Mbarrier& b = find_mbarrier(address, pc);
  while (b.phase == parity) {
    current->state = State::at_mbarrier;
    current->pc = pc;
    b.waiting.push_back(current->number);
    wait();
  }
  if (checking && b.epoch == current_epoch()) acquire_from(b.released.data());
}

void fence_proxy_async() { fence_async_proxy(); }

// --- TMA

void tma_load(uint32_t address, const void* map, int rank, const int* coordinates,
              uint32_t barrier) {
  const void* pc = __builtin_return_address(0);
  if (!find_mbarrier(barrier, pc).fenced) {
    report("PROXY", pc, nullptr, "no fence_mbarrier_init() since the mbarrier was initialised");
  }
  Load load = {decode(map, rank, address, pc), {}, address, barrier, pc, {}, {}};
  std::copy_n(coordinates, rank, load.coordinates);
  const int bytes = load.map.box_bytes();
  char* tile = shared_at(address, bytes, pc);
  if (checking) {
    for (int i = 0; i < bytes; i += 16) touch(tile + i, 16, Access::write, pc);
    mark_in_flight(tile, bytes, pc);
    load.issued = now();
    load.clocks.assign(kMaxThreads, 0);
    release_to(load.clocks.data());
  }
  std::memset(tile, kPoison, bytes);
  loads.push_back(std::move(load));
}

bool land_one() {
  if (loads.empty()) return false;
  if (schedule == Schedule::random) std::swap(loads[0], loads[random_bits() % loads.size()]);
  const Load load = std::move(loads.front());
  loads.pop_front();
  const OnBehalfOf instruction(load.pc);
  const int bytes = load.map.box_bytes();
  load.map.for_each_chunk(load.coordinates, load.address,
                          [&](uint32_t address, const char* source, int first, int end) {
                            char* destination = shared_at(address, 16, load.pc);
                            std::memset(destination, 0, 16);
                            if (first < end)
                              std::memcpy(destination + first, source + first, end - first);
                          });
  Mbarrier& b = mbarriers.at(load.barrier);
  if (checking) {
    mark_landed(shared_at(load.address, bytes, load.pc), bytes, load.issued, true);
    if (b.epoch == load.issued.epoch) {
      for (int t = 0; t < block.threads; ++t) {
        b.releasing[t] = std::max(b.releasing[t], load.clocks[t]);
      }
    }
  }
  b.bytes -= bytes;
  complete_phase_if_due(b);
  return true;
}

void tma_store(const void* map, int rank, uint32_t address, const int* coordinates) {
  const void* pc = __builtin_return_address(0);
  Store store = {decode(map, rank, address, pc), {}, address, pc};
  std::copy_n(coordinates, rank, store.coordinates);
  shared_at(address, store.map.box_bytes(), pc);
  read_for_store(store);
  stores[current->number].open.push_back(store);
}

void tma_store_commit() { stores[current->number].commit(); }

void tma_store_wait(int keep) {
  stores[current->number].retire(keep, [](const Store& s) {
    const OnBehalfOf instruction(s.pc);
    read_for_store(s);
    s.map.for_each_chunk(
        s.coordinates, s.address, [&](uint32_t address, char* target, int first, int end) {
          if (first >= end) return;
          if (checking) touch_range(target + first, end - first, Access::write, s.pc);
          std::memcpy(target + first, shared_at(address, 16, s.pc) + first, end - first);
        });
  });
}

// --- Begin and end

void check_pending_copies(const Thread& exiting) {
  if (const Copy* c = copies[exiting.number].oldest()) {
    report("NOT WAITED FOR", c->pc, nullptr, "the thread ends with a cp.async in flight");
  }
  if (const Store* s = stores[exiting.number].oldest()) {
    report("NOT WAITED FOR", s->pc, nullptr, "the thread ends with a TMA store in flight");
  }
}

void begin_block_async() {
  for (int t = 0; t < block.threads; ++t) {
    copies[t].clear();
    stores[t].clear();
  }
  mbarriers.clear();
  loads.clear();
}

void end_block_async() {
  if (loads.empty()) return;
  report("NOT WAITED FOR", loads.front().pc, nullptr, "the block ends with a TMA load in flight");
}

}  // namespace emu
