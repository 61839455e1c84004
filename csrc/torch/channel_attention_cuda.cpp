// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels under the names of the CPU's: unpack, check, allocate, launch on the current stream of the tensors' device.
#include "core/channel_attention/cuda.h"

#include <tuple>

#include "channel_attention.h"
#include "launch.h"

namespace pywino {
namespace {

namespace cuda = channel_attention::cuda;

// The weights as the kernels read them, in a tensor's dtype and for its channels, and what keeps their memory.
class Weights {
 public:
  Weights(const Tensor& like, ScalarType dtype, const Tensor& w1, const std::optional<Tensor>& b1,
          const Tensor& w2, const std::optional<Tensor>& b2, const std::optional<Tensor>& w3,
          const char* op)
      : like_(like), dtype_(dtype), op_(op) {
    STD_TORCH_CHECK(w1.dim() == 2, op, ": w1 must be (hidden, channels)");
    const int64_t channels = like.size(1);
    layers.hidden = w1.size(0);
    // Of shared memory a block can have 99 KB on every GPU.
    STD_TORCH_CHECK(channels + layers.hidden <= 24 * 1024, op,
                    ": the kernel takes 24576 channels and hidden numbers together, got ",
                    channels + layers.hidden, "; use backend=\"aten\"");
    layers.w1 = keep(0, w1, layers.hidden * channels);
    layers.b1 = b1 ? keep(1, *b1, layers.hidden) : nullptr;
    layers.w2 = keep(2, w2, channels * layers.hidden);
    layers.b2 = b2 ? keep(3, *b2, channels) : nullptr;
    layers.w3 = w3 ? keep(4, *w3, channels * channels) : nullptr;
  }

  cuda::Layers layers{};

 private:
  const void* keep(int slot, const Tensor& t, int64_t size) {
    STD_TORCH_CHECK(t.numel() == size, op_, ": a weight or bias does not fit input's channels");
    check_same_device(like_, t, op_, "a weight or bias");
    kept_[slot] =
        torch::stable::contiguous(t.scalar_type() == dtype_ ? t : torch::stable::to(t, dtype_));
    return kept_[slot]->const_data_ptr();
  }

  const Tensor& like_;
  ScalarType dtype_;
  const char* op_;
  std::optional<Tensor> kept_[5];
};

Tensor empty_as(const Tensor& input) {
  return empty_like(input, {input.size(0), input.size(1), input.size(2), input.size(3)},
                    input.scalar_type(), is_channels_last(input));
}

Tensor empty_sums(const Tensor& input, int64_t parts) {
  return empty_like(input, {input.size(0), parts, input.size(1)}, ScalarType::Float, false);
}

Tensor empty_gate(const Tensor& input) {
  return empty_like(input, {input.size(0), input.size(1)}, ScalarType::Float, false);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// What all forward ops share; a new output, or the input itself.
cuda::Forward forward_params(const Tensor& input, const Tensor& output, const Tensor& gate,
                             const Weights& weights, const std::optional<Tensor>& residual,
                             bool relu, bool residual_relu, const char* op) {
  cuda::Forward p{};
  p.shape = shape_of(input, op);
  if (residual) check_like(*residual, input, op, "residual");
  if (residual) check_same_device(input, *residual, op, "residual");
  p.layers = weights.layers;
  p.input = input.const_data_ptr();
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.gate = floats(gate);
  p.relu = relu;
  p.residual_relu = residual_relu;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& w1,
                                           const std::optional<Tensor>& b1, const Tensor& w2,
                                           const std::optional<Tensor>& b2,
                                           const std::optional<Tensor>& w3,
                                           const std::optional<Tensor>& residual, bool relu,
                                           bool residual_relu) {
  constexpr const char* op = "pywino::_channel_attention_forward";
  shape_of(input, op);
  const Launch launch(input, op, cuda::pywino_channel_attention_cuda_error);
  const Weights weights(input, input.scalar_type(), w1, b1, w2, b2, w3, op);
  Tensor output = empty_as(input), mean = empty_gate(input), gate = empty_gate(input);
  cuda::Forward p = forward_params(input, output, gate, weights, residual, relu, residual_relu, op);
  p.whole = cuda::has_whole(p.shape, p.layers.hidden, 1);
  Tensor partial = empty_sums(input, p.whole ? 0 : cuda::parts_of(p.shape));
  p.mean = floats(mean);
  p.partial = floats(partial);
  launch.check(cuda::pywino_channel_attention_forward(&p, launch.stream()));
  return {output, mean, gate};
}

void check_mean(const Tensor& mean, int64_t n, int64_t c, const char* op) {
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Float && mean.dim() == 2 &&
                      mean.is_contiguous() && mean.size(0) == n && mean.size(1) == c && n > 0 &&
                      c > 0,
                  op, ": mean must be contiguous float32 numbers, one an image and channel");
}

// g of z, where what reads the tensor next applies it.
Tensor gate_of(const Tensor& mean, const Tensor& w1, const std::optional<Tensor>& b1,
               const Tensor& w2, const std::optional<Tensor>& b2, const std::optional<Tensor>& w3) {
  constexpr const char* op = "pywino::_channel_attention_gate";
  STD_TORCH_CHECK(mean.dim() == 2, op, ": mean must be (N, C)");
  check_mean(mean, mean.size(0), mean.size(1), op);
  const Launch launch(mean, op, cuda::pywino_channel_attention_cuda_error);
  const Weights weights(mean, w1.scalar_type(), w1, b1, w2, b2, w3, op);
  Tensor gate = empty_gate(mean);
  cuda::Forward p{};
  p.shape = {mean.size(0), mean.size(1), 1, true, dtype_of(w1, op, "w1")};
  p.layers = weights.layers;
  p.known = static_cast<const float*>(mean.const_data_ptr());
  p.gate = floats(gate);
  launch.check(cuda::pywino_channel_attention_gate(&p, launch.stream()));
  return gate;
}

// y of a known z, into `output`.
void apply_to(const Tensor& output, const Tensor& input, const Tensor& mean, const Tensor& w1,
              const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2,
              const std::optional<Tensor>& w3, const std::optional<Tensor>& residual, bool relu,
              bool residual_relu, const char* op) {
  shape_of(input, op);
  check_mean(mean, input.size(0), input.size(1), op);
  check_same_device(input, mean, op, "mean");
  const Launch launch(input, op, cuda::pywino_channel_attention_cuda_error);
  const Weights weights(input, input.scalar_type(), w1, b1, w2, b2, w3, op);
  Tensor gate = empty_gate(input);
  cuda::Forward p = forward_params(input, output, gate, weights, residual, relu, residual_relu, op);
  p.known = static_cast<const float*>(mean.const_data_ptr());
  launch.check(cuda::pywino_channel_attention_gate(&p, launch.stream()));
  launch.check(cuda::pywino_channel_attention_apply(&p, launch.stream()));
}

Tensor apply(const Tensor& input, const Tensor& mean, const Tensor& w1,
             const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2,
             const std::optional<Tensor>& w3, const std::optional<Tensor>& residual, bool relu,
             bool residual_relu) {
  constexpr const char* op = "pywino::_channel_attention_apply";
  shape_of(input, op);
  Tensor output = empty_as(input);
  apply_to(output, input, mean, w1, b1, w2, b2, w3, residual, relu, residual_relu, op);
  return output;
}

void apply_in_place(const Tensor& input, const Tensor& mean, const Tensor& w1,
                    const std::optional<Tensor>& b1, const Tensor& w2,
                    const std::optional<Tensor>& b2, const std::optional<Tensor>& w3,
                    const std::optional<Tensor>& residual, bool relu, bool residual_relu) {
  apply_to(input, input, mean, w1, b1, w2, b2, w3, residual, relu, residual_relu,
           "pywino::_channel_attention_apply_");
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                    const Tensor& gate, const Tensor& w1,
                                    const std::optional<Tensor>& b1, const Tensor& w2,
                                    const std::optional<Tensor>& w3, bool relu) {
  constexpr const char* op = "pywino::_channel_attention_backward";
  cuda::Backward p{};
  p.shape = shape_of(input, op);
  const Launch launch(input, op, cuda::pywino_channel_attention_cuda_error);
  const Weights weights(input, input.scalar_type(), w1, b1, w2, std::nullopt, w3, op);
  check_like(grad, input, op, "grad");
  check_same_device(input, grad, op, "grad");
  for (const Tensor* t : {&mean, &gate}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                        t->numel() == p.shape.n * p.shape.c,
                    op, ": mean and gate must be those of the forward pass");
    check_same_device(input, *t, op, "mean and gate");
  }
  Tensor input_gradient = empty_as(input), logit_gradient = empty_gate(input);
  p.layers = weights.layers;
  p.whole = cuda::has_whole(p.shape, p.layers.hidden, 2);
  Tensor partial = empty_sums(input, p.whole ? 0 : cuda::parts_of(p.shape));
  Tensor shift = empty_gate(input);
  p.grad = grad.const_data_ptr();
  p.input = input.const_data_ptr();
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.gate = static_cast<const float*>(gate.const_data_ptr());
  p.relu = relu;
  p.input_gradient = input_gradient.mutable_data_ptr();
  p.logit_gradient = floats(logit_gradient);
  p.partial = floats(partial);
  p.shift = floats(shift);
  launch.check(cuda::pywino_channel_attention_backward(&p, launch.stream()));
  return {input_gradient, logit_gradient};
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, PYWINO_CUDA_KEY, m) {
  m.impl("_channel_attention_forward", TORCH_BOX(&pywino::forward));
  m.impl("_channel_attention_gate", TORCH_BOX(&pywino::gate_of));
  m.impl("_channel_attention_apply", TORCH_BOX(&pywino::apply));
  m.impl("_channel_attention_apply_", TORCH_BOX(&pywino::apply_in_place));
  m.impl("_channel_attention_backward", TORCH_BOX(&pywino::backward));
}
