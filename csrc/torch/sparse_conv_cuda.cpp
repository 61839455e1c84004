// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels as torch ops: unpack, check, allocate, launch on the current stream of the tensors' device.
// pywino/ops/sparse_conv.py has schemas, fakes, and what packs the filters. What a filter says of its own order is not checked:
// it is on the device.
#include "core/sparse_conv/cuda.h"
#include "launch.h"

namespace pywino {
namespace {

namespace cuda = sparse_conv::cuda;

// What every kernel asks for. Checks the bias, too.
sparse_conv::Geometry geometry_of(const Tensor& input, const std::optional<Tensor>& bias,
                                  int64_t out_channels, IntArray kernel_size, IntArray stride,
                                  IntArray padding, IntArray dilation, const char* op) {
  check_dense(input, op, "input");
  check_pair(kernel_size, 1, op, "kernel_size");
  check_pair(stride, 1, op, "stride");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  const sparse_conv::Geometry g = {
      input.size(0),  input.size(1),  input.size(2), input.size(3), out_channels,
      kernel_size[0], kernel_size[1], stride[0],     stride[1],     padding[0],
      padding[1],     dilation[0],    dilation[1],   true,          dtype_of(input, op, "input")};
  STD_TORCH_CHECK(g.h + 2 * g.pad_h > g.dil_h * (g.kernel_h - 1) &&
                      g.w + 2 * g.pad_w > g.dil_w * (g.kernel_w - 1) && input.numel() > 0 &&
                      out_channels > 0,
                  op, ": the output would be empty");
  check_bias(bias, out_channels, op);
  if (bias) check_same_device(input, *bias, op, "bias");
  return g;
}

// Of kernels that gather channels_last pixels of whole 16 bytes.
void check_pixels(const Tensor& input, const sparse_conv::Geometry& g, const char* op) {
  STD_TORCH_CHECK(
      is_channels_last(input) || (input.is_contiguous() && (g.c == 1 || g.h * g.w == 1)), op,
      ": input must be channels_last");
  STD_TORCH_CHECK(g.c * int64_t(input.element_size()) % 16 == 0, op,
                  ": a pixel's channels must be a multiple of 16 bytes");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16 == 0, op,
                  ": input must begin at a multiple of 16 bytes; clone it");
  STD_TORCH_CHECK(
      g.n * g.h * g.w < (int64_t(1) << 31) && g.n * g.out_h() * g.out_w() < (int64_t(1) << 31), op,
      ": input and output must have less than 2^31 pixels");
}

Tensor output_of(const Tensor& input, const sparse_conv::Geometry& g) {
  return empty_like(input, {g.n, g.out_channels, g.out_h(), g.out_w()}, input.scalar_type(), true);
}

const float* data_of(const std::optional<Tensor>& bias) {
  return bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
}

// y = conv(x) + b without blocks of zeros, channels_last.
Tensor forward(const Tensor& input, const Tensor& values, const Tensor& entries,
               const Tensor& starts, const std::optional<Tensor>& bias, int64_t out_channels,
               IntArray kernel_size, IntArray stride, IntArray padding, IntArray dilation,
               bool strict) {
  constexpr const char* op = "pywino::_sparse_cuda_forward";
  cuda::Forward p{};
  p.geometry = geometry_of(input, bias, out_channels, kernel_size, stride, padding, dilation, op);
  check_pixels(input, p.geometry, op);
  STD_TORCH_CHECK(
      values.scalar_type() == input.scalar_type() && values.is_contiguous() && values.dim() == 3 &&
          (values.size(1) == 64 || values.size(1) == 128) && values.size(2) == cuda::kChannels,
      op, ": values must be (blocks, 64 or 128, ", cuda::kChannels, ") of input's dtype");
  const int64_t groups = (out_channels + values.size(1) - 1) / values.size(1);
  STD_TORCH_CHECK(entries.scalar_type() == ScalarType::Int && entries.is_contiguous() &&
                      entries.numel() == values.size(0) &&
                      starts.scalar_type() == ScalarType::Int && starts.is_contiguous() &&
                      starts.numel() == groups + 1,
                  op, ": the filter was packed for another weight");
  check_same_device(input, values, op, "values");
  check_same_device(input, entries, op, "entries");
  check_same_device(input, starts, op, "starts");
  const Launch launch(input, op, cuda::pywino_sparse_conv_cuda_error);
  Tensor output = output_of(input, p.geometry);
  p.group = int(values.size(1));
  p.strict = strict;
  p.input = input.const_data_ptr();
  p.values = values.const_data_ptr();
  p.entries = static_cast<const int32_t*>(entries.const_data_ptr());
  p.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  p.bias = data_of(bias);
  p.output = output.mutable_data_ptr();
  launch.check(cuda::pywino_sparse_conv_forward(&p, launch.stream()));
  return output;
}

// The same of a 2:4 weight, in 16 bits.
Tensor two_of_four(const Tensor& input, const Tensor& values, const Tensor& metadata,
                   const std::optional<Tensor>& bias, int64_t out_channels, IntArray kernel_size,
                   IntArray stride, IntArray padding, IntArray dilation) {
  constexpr const char* op = "pywino::_sparse_cuda_two_of_four";
  cuda::TwoOfFour p{};
  p.geometry = geometry_of(input, bias, out_channels, kernel_size, stride, padding, dilation, op);
  const sparse_conv::Geometry& g = p.geometry;
  check_pixels(input, g, op);
  STD_TORCH_CHECK(g.dtype != DType::f32, op, ": input must be float16 or bfloat16");
  const int64_t steps = g.kernel_h * g.kernel_w * ((g.c + cuda::kStep - 1) / cuda::kStep);
  const int64_t rows =
      (out_channels + cuda::kOutChannels - 1) / cuda::kOutChannels * cuda::kOutChannels;
  STD_TORCH_CHECK(values.scalar_type() == input.scalar_type() && values.is_contiguous() &&
                      values.numel() == steps * rows * (cuda::kStep / 2) &&
                      metadata.scalar_type() == ScalarType::Int && metadata.is_contiguous() &&
                      metadata.numel() == steps * rows * 2,
                  op, ": the filter was packed for another weight");
  check_same_device(input, values, op, "values");
  check_same_device(input, metadata, op, "metadata");
  const Launch launch(input, op, cuda::pywino_sparse_conv_cuda_error);
  Tensor output = output_of(input, g);
  p.input = input.const_data_ptr();
  p.values = values.const_data_ptr();
  p.metadata = static_cast<const int32_t*>(metadata.const_data_ptr());
  p.bias = data_of(bias);
  p.output = output.mutable_data_ptr();
  launch.check(cuda::pywino_sparse_conv_two_of_four(&p, launch.stream()));
  return output;
}

// The same in fp32 of a weight with zeros anywhere, contiguous; the input has its padding.
Tensor csr(const Tensor& input, const Tensor& values, const Tensor& entries, const Tensor& starts,
           const std::optional<Tensor>& bias, IntArray kernel_size, IntArray stride,
           IntArray dilation) {
  constexpr const char* op = "pywino::_sparse_cuda_csr";
  constexpr int64_t none[] = {0, 0};
  const int64_t out_channels = starts.numel() - 1;
  cuda::Csr p{};
  p.geometry = geometry_of(input, bias, out_channels, kernel_size, stride, none, dilation, op);
  const sparse_conv::Geometry& g = p.geometry;
  STD_TORCH_CHECK(g.dtype == DType::f32 && input.is_contiguous(), op,
                  ": input must be float32 and contiguous");
  STD_TORCH_CHECK(g.c * g.h * g.w < (int64_t(1) << 31), op,
                  ": an image must have less than 2^31 numbers");
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
                      entries.scalar_type() == ScalarType::Int && entries.is_contiguous() &&
                      entries.numel() == values.numel() &&
                      starts.scalar_type() == ScalarType::Int && starts.is_contiguous(),
                  op, ": the filter must be float32 values, and int32 entries and starts");
  check_same_device(input, values, op, "values");
  check_same_device(input, entries, op, "entries");
  check_same_device(input, starts, op, "starts");
  const Launch launch(input, op, cuda::pywino_sparse_conv_cuda_error);
  Tensor output =
      empty_like(input, {g.n, out_channels, g.out_h(), g.out_w()}, ScalarType::Float, false);
  p.input = static_cast<const float*>(input.const_data_ptr());
  p.values = static_cast<const float*>(values.const_data_ptr());
  p.entries = static_cast<const int32_t*>(entries.const_data_ptr());
  p.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  p.bias = data_of(bias);
  p.output = static_cast<float*>(output.mutable_data_ptr());
  launch.check(cuda::pywino_sparse_conv_csr(&p, launch.stream()));
  return output;
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, PYWINO_CUDA_KEY, m) {
  m.impl("_sparse_cuda_forward", TORCH_BOX(&pywino::forward));
  m.impl("_sparse_cuda_two_of_four", TORCH_BOX(&pywino::two_of_four));
  m.impl("_sparse_cuda_csr", TORCH_BOX(&pywino::csr));
}
