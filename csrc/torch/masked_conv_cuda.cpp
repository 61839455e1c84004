// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernel as a torch op: unpack, check, allocate, launch on the current stream of the tensors' device.
// pywino/ops/masked_conv.py has schema and fake.
#include "core/masked_conv/cuda.h"
#include "launch.h"

namespace pywino {
namespace {

namespace cuda = masked_conv::cuda;

// y = m (conv(m x) + b), for a filter (K, height, width, C') of rows of whole 16 bytes.
Tensor forward(const Tensor& input, const Tensor& mask, const Tensor& filter,
               const std::optional<Tensor>& bias, IntArray padding, IntArray dilation,
               bool strict) {
  constexpr const char* op = "pywino::_masked_cuda_forward";
  check_dense(input, op, "input");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  const int64_t size = input.element_size(), pitch = cuda::padded(c, size), pixels = n * h * w;
  STD_TORCH_CHECK(pixels > 0 && c > 0, op, ": the call is empty");
  STD_TORCH_CHECK(pixels < (int64_t(1) << 31), op, ": input must have less than 2^31 pixels");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() &&
                      mask.dim() == 4 && mask.size(0) == n && mask.size(1) == 1 &&
                      mask.size(2) == h && mask.size(3) == w,
                  op, ": mask must be contiguous and bool, (", n, ", 1, ", h, ", ", w, ")");
  check_same_device(input, mask, op, "mask");
  STD_TORCH_CHECK(filter.scalar_type() == input.scalar_type() && filter.is_contiguous() &&
                      filter.dim() == 4 && filter.numel() > 0 && filter.size(3) == pitch,
                  op, ": filter must be (K, height, width, ", pitch, ") of input's dtype");
  check_same_device(input, filter, op, "filter");
  check_bias(bias, filter.size(0), op);
  if (bias) check_same_device(input, *bias, op, "bias");
  cuda::Forward p{};
  p.geometry = {n,
                c,
                h,
                w,
                filter.size(0),
                filter.size(1),
                filter.size(2),
                padding[0],
                padding[1],
                dilation[0],
                dilation[1],
                is_channels_last(input),
                dtype_of(input, op, "input")};
  // Pixels of a plane of one channel, or an image of one pixel, are channels_last as well.
  const bool as_they_lie = (p.geometry.channels_last || c == 1 || h * w == 1) && pitch == c &&
                           reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16 == 0;
  const Launch launch(input, op, cuda::pywino_masked_conv_cuda_error);
  Tensor starts = empty_like(input, {cuda::list_blocks(pixels) + 1}, ScalarType::Int, false);
  Tensor list = empty_like(input, {pixels}, ScalarType::Int, false);
  Tensor place = empty_like(input, {pixels}, ScalarType::Int, false);
  Tensor rows = empty_like(input, {as_they_lie ? 0 : pixels * pitch}, input.scalar_type(), false);
  Tensor output =
      empty_like(input, {n, filter.size(0), h, w}, input.scalar_type(), p.geometry.channels_last);
  p.list = {pixels, static_cast<const uint8_t*>(mask.const_data_ptr()),
            static_cast<int32_t*>(starts.mutable_data_ptr()),
            static_cast<int32_t*>(list.mutable_data_ptr()),
            static_cast<int32_t*>(place.mutable_data_ptr())};
  p.strict = strict;
  p.input = input.const_data_ptr();
  p.rows = as_they_lie ? nullptr : rows.mutable_data_ptr();
  p.filter = filter.const_data_ptr();
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.output = output.mutable_data_ptr();
  launch.check(cuda::pywino_masked_conv_forward(&p, launch.stream()));
  return output;
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, PYWINO_CUDA_KEY, m) {
  m.impl("_masked_cuda_forward", TORCH_BOX(&pywino::forward));
}
