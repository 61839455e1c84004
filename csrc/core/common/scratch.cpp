// SPDX-License-Identifier: BSD-3-Clause
#include "scratch.h"

#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pywino {
namespace {

constexpr std::size_t kHugePage = std::size_t(2) << 20;

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[kScratchSlots];

}  // namespace

void* scratch(std::size_t bytes, ScratchSlot slot) {
  Buffer& b = buffers[int(slot)];
  if (b.size >= bytes) return b.data;
  std::free(b.data);
  const std::size_t align = bytes >= kHugePage ? kHugePage : 4096;
  b.size = (bytes + align - 1) / align * align;
  b.data = std::aligned_alloc(align, b.size);
  if (!b.data) b.size = 0;
#ifdef __linux__
  if (b.data && align == kHugePage) madvise(b.data, b.size, MADV_HUGEPAGE);
#endif
  return b.data;
}

std::size_t scratch_bytes() {
  std::size_t bytes = 0;
  for (const Buffer& b : buffers) bytes += b.size;
  return bytes;
}

}  // namespace pywino
