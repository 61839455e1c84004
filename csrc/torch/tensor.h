// SPDX-License-Identifier: BSD-3-Clause
// What the LibTorch stable ABI leaves to its users: memory formats, dtypes, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core/common/dtype.h"
#include "core/common/executor.h"

namespace pywino {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
  return DType::f32;
}

// Dense with channels innermost and not also dense with columns innermost: the one rule for every output's memory format.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline void check_dense(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.is_contiguous() || is_channels_last(t)), op, ": ", name,
                  " must be a dense 4-d tensor, contiguous or channels_last");
}

// For rows and columns.
inline void check_pair(torch::headeronly::IntHeaderOnlyArrayRef pair, int64_t least, const char* op,
                       const char* name) {
  STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, op, ": ", name,
                  " must be two numbers >= ", least);
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t count, const char* op) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == count &&
                            bias->scalar_type() == ScalarType::Float && bias->is_contiguous()),
                  op, ": bias must be ", count, " contiguous float32 numbers");
}

// Uninitialised, on the CPU. Large ones, of which glibc maps each anew, in huge pages: a first write costs one page fault for
// 2 MB, not for 4 KB.
inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype,
                        bool channels_last) {
  Tensor t = torch::stable::empty(
      size, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + t.numel() * t.element_size()) /
      kHugePage * kHugePage;
  if (t.numel() * int64_t(t.element_size()) >= (int64_t(32) << 20) && end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin,
            MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
  return t;
}

// Torch's own thread pool: no second one that would fight for the cores.
inline Executor torch_threads() {
  return {[](int threads, void (*body)(void*), void* arg) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(arg);
            });
          },
          int(torch::stable::get_num_threads())};
}

}  // namespace pywino
