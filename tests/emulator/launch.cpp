// SPDX-License-Identifier: BSD-3-Clause
// A launch: shared memory is laid out, the blocks run one after another. Also the calls of the CUDA runtime that
// launchers make.
#include <cuda.h>
#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "async.h"
#include "collectives.h"
#include "fiber.h"
#include "interface.h"
#include "matrix.h"
#include "memory.h"
#include "report.h"
#include "shadow.h"

namespace emu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kDefaultDynamicShared = 48 << 10;
constexpr int kMultiprocessors = 3;  // few, so that persistent kernels go round

std::map<const void*, size_t> allowed_dynamic_shared;
char* dynamic_end = nullptr;  // a page that nobody may touch begins here
char* dynamic_shared = nullptr;
size_t dynamic_bytes = 0;
char* static_shared = nullptr;
size_t static_bytes = 0;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

void allocate_dynamic_shared() {
  if (dynamic_end) return;
  const size_t bytes = round_up(kMaxDynamicShared + kSharedAlignment, kPage);
  char* p = static_cast<char*>(
      mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  dynamic_end = p + bytes;
  mprotect(dynamic_end, kPage, PROT_NONE);
}

// The module of the kernel: its thread-local block, and the range of its code and constants.
struct Module {
  const char* anchor;
  char *low, *high;
};

int look_for_module(dl_phdr_info* info, size_t, void* query) {
  auto& module = *static_cast<Module*>(query);
  const char* tls = static_cast<char*>(info->dlpi_tls_data);
  size_t tls_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_TLS) tls_bytes = info->dlpi_phdr[i].p_memsz;
  }
  if (!tls || static_cast<size_t>(module.anchor - tls) >= tls_bytes) return 0;
  static_shared = const_cast<char*>(tls);
  static_bytes = tls_bytes;
  module.low = reinterpret_cast<char*>(~uintptr_t{0});
  module.high = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    char* low = reinterpret_cast<char*>(info->dlpi_addr + segment.p_vaddr);
    if (low < module.low) module.low = low;
    if (low + segment.p_memsz > module.high) module.high = low + segment.p_memsz;
  }
  return 1;
}

bool valid(const char* name, const void* function, dim3 grid, dim3 size, size_t shared_bytes) {
  const uint64_t count = uint64_t{size.x} * size.y * size.z;
  if (count < 1 || count > kMaxThreads || size.z > 64 || !grid.x || !grid.y || !grid.z ||
      grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
    report("LAUNCH", function, nullptr, "%s with grid (%u, %u, %u), block (%u, %u, %u)", name,
           grid.x, grid.y, grid.z, size.x, size.y, size.z);
    return false;
  }
  const auto entry = allowed_dynamic_shared.find(function);
  const size_t allowed =
      entry == allowed_dynamic_shared.end() ? kDefaultDynamicShared : entry->second;
  if (shared_bytes > allowed) {
    report("LAUNCH", function, nullptr,
           "%s with %zu bytes of dynamic shared memory, %zu are allowed: call cudaFuncSetAttribute",
           name, shared_bytes, allowed);
    return false;
  }
  return true;
}

}  // namespace

uint64_t identity_xy(int which) {
  const auto pack = [](unsigned x, unsigned y) { return uint64_t{y} << 32 | x; };
  switch (which) {
    case kThreadIndex: return pack(current->index.x, current->index.y);
    case kBlockIndex: return pack(block.index.x, block.index.y);
    case kBlockSize: return pack(block.size.x, block.size.y);
    default: return pack(block.grid.x, block.grid.y);
  }
}

unsigned identity_z(int which) {
  switch (which) {
    case kThreadIndex: return current->index.z;
    case kBlockIndex: return block.index.z;
    case kBlockSize: return block.size.z;
    default: return block.grid.z;
  }
}

void* dyn_smem() { return dynamic_shared; }

uint32_t to_shared(const void* vp) {
  const char* p = static_cast<const char*>(vp);
  if (p >= dynamic_shared && p <= dynamic_shared + dynamic_bytes) {
    return kDynamicBase + static_cast<uint32_t>(p - dynamic_shared);
  }
  if (p >= static_shared && p <= static_shared + static_bytes) {
    return kStaticBase + static_cast<uint32_t>(p - static_shared);
  }
  fail("ADDRESS", __builtin_return_address(0), nullptr, "%p is not in shared memory", vp);
  return 0;
}

char* shared_at(uint32_t address, int bytes, const void* pc) {
  const bool is_dynamic = address < kStaticBase;
  const size_t offset = address - (is_dynamic ? kDynamicBase : kStaticBase);
  const size_t size = is_dynamic ? dynamic_bytes : static_bytes;
  if (offset + bytes > size) {
    fail("OUT-OF-BOUNDS", pc, nullptr, "%d bytes at %s shared memory+%zd, which has %zu", bytes,
         is_dynamic ? "dynamic" : "static", static_cast<ssize_t>(offset), size);
  }
  return (is_dynamic ? dynamic_shared : static_shared) + offset;
}

void check_align(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    fail("MISALIGNED", __builtin_return_address(0), nullptr, "a vector of %d bytes at %p", bytes,
         p);
  }
}

void atomic_access(void* p, int bytes) {
  // So that a loop that waits for another thread of the block comes to an end.
  static unsigned count = 0;
  if (current && ++count % 64 == 0) yield();
  if (checking && current) touch(p, bytes, Access::atomic, __builtin_return_address(0));
}

int launch(const char* name, const void* function, dim3 grid, dim3 size, size_t shared_bytes,
           void (*body)(void*), void* arguments, size_t arguments_bytes, void* anchor) {
  const long findings_before = findings();
  current = nullptr;
  abandoned = false;
  OnBehalfOf::instruction = nullptr;  // a launch that was given up has left it
  block = Block{name, grid, size, {}, static_cast<int>(size.x * size.y * size.z), 0, 0};
  block.warps = (block.threads + kLanes - 1) / kLanes;
  if (!valid(name, function, grid, size, shared_bytes)) return 1;

  install_signal_handlers();
  allocate_dynamic_shared();
  dynamic_bytes = shared_bytes;
  dynamic_shared = dynamic_end - round_up(shared_bytes, kSharedAlignment);
  Module module = {static_cast<const char*>(anchor), nullptr, nullptr};
  dl_iterate_phdr(look_for_module, &module);
  if (checking) {
    set_shared(dynamic_shared, dynamic_bytes, static_shared, static_bytes);
    set_module(module.low, module.high);
    set_arguments(arguments, arguments_bytes);
  }
  begin_launch();
  start_timer();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !abandoned; ++i) {
    const uint64_t b = schedule == Schedule::descending ? blocks - 1 - i : i;
    block.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    block.alive = block.threads;
    std::memset(dynamic_shared, kPoison, dynamic_bytes);
    std::memset(static_shared, kPoison, static_bytes);
    begin_block();
    begin_block_collectives();
    begin_block_async();
    begin_block_matrix();
    run_block(body, arguments);
    current = nullptr;
    if (!abandoned) {
      end_block_async();
      end_block_matrix();
    }
  }
  stop_timer();
  return findings() > findings_before;
}

}  // namespace emu

// --- For the harness

extern "C" void emu_configure(int check, int schedule, uint64_t seed, int seconds) {
  emu::checking = check;
  emu::schedule = static_cast<emu::Schedule>(schedule);
  emu::seed_random(seed);
  emu::set_time_limit(seconds);
}

// Device memory: nothing for some pages before and behind. The end is as near to the guard as 16-byte alignment allows; the
// harness looks whether the up to 15 bytes between have kept their poison.
constexpr size_t kGuard = 4 << 20;

extern "C" void* emu_allocate(size_t bytes) {
  const size_t room = emu::round_up(bytes, emu::kPage);
  char* p = static_cast<char*>(mmap(nullptr, room + 2 * kGuard, PROT_NONE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(p + kGuard, room, PROT_READ | PROT_WRITE);
  std::memset(p + kGuard, emu::kPoison, room);
  return p + kGuard + (room - bytes) / 16 * 16;
}

extern "C" void emu_free(void* p, size_t bytes) {
  const size_t room = emu::round_up(bytes, emu::kPage);
  munmap(static_cast<char*>(p) - (room - bytes) / 16 * 16 - kGuard, room + 2 * kGuard);
}

// --- The CUDA runtime

extern "C" {

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > static_cast<int>(emu::kMaxDynamicShared)) return cudaErrorInvalidValue;
  emu::allowed_dynamic_shared[function] = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return emu::findings() ? cudaErrorLaunchFailure : cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaGetLastError(); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the emulator has findings";
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emu::kMultiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emu::kMaxDynamicShared;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = emu::kDefaultDynamicShared;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: *value = emu::kMaxThreads; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = emu::kLanes; return cudaSuccess;
    default: return cudaErrorNotSupported;
  }
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  emu::host_write(p, bytes);
  return cudaSuccess;
}

}  // extern "C"
