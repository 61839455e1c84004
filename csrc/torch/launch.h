// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of CUDA kernels share: the device, its stream, outputs. No CUDA header: the library loads, and its ops
// register, on a machine without a GPU.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensor.h"

// The tests register the same bindings over emulated kernels, which read CPU tensors.
#ifndef PYWINO_CUDA_KEY
#define PYWINO_CUDA_KEY CUDA
#endif

namespace pywino {

using IntArray = torch::headeronly::IntHeaderOnlyArrayRef;

// aoti_torch_get_current_cuda_stream is in libtorch_cuda.so, which a torch without CUDA does not have: so this library is not
// linked with it, and looks it up where torch has loaded it.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
inline CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<CurrentStream>(
      dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}

// Makes a tensor's device the current one, and knows its stream.
class Launch {
 public:
  // name_of: the text of an error, from the library that launches.
  Launch(const Tensor& tensor, const char* op, const char* (*name_of)(int))
      : op_(op), name_of_(name_of) {
    if (!tensor.is_cuda()) return;
    guard_.emplace(tensor.get_device_index());
    static const CurrentStream current_stream = find_current_stream();
    STD_TORCH_CHECK(current_stream, op, ": this torch has no CUDA streams; install one with CUDA");
    TORCH_ERROR_CODE_CHECK(current_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }
  void check(int error) const {
    STD_TORCH_CHECK(error == 0, op_, ": the kernel did not start: ", name_of_(error),
                    ". If no kernel image fits the device, build pywino with its architecture in "
                    "TORCH_CUDA_ARCH_LIST; backend=\"aten\" runs PyTorch's kernel");
  }

 private:
  const char* op_;
  const char* (*name_of_)(int);
  void* stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline Tensor empty_like(const Tensor& like, IntArray size, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(
      size, dtype, std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void check_same_device(const Tensor& a, const Tensor& b, const char* op, const char* name) {
  STD_TORCH_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), op,
                  ": ", name, " must be on input's device");
}

}  // namespace pywino
