// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels as torch ops: unpack, check, allocate, launch. Schemas, fakes and gradients are in
// pywino/ops/channel_attention.py, which also words the errors that a user can cause; the checks here only keep memory safe.
#include "channel_attention.h"

#include <tuple>

namespace pywino {
namespace {

using channel_attention::Status;

// The weights as the kernels read them, and what keeps their memory.
class Weights {
 public:
  Weights(const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
          const std::optional<Tensor>& b2, const std::optional<Tensor>& w3, int64_t channels,
          const char* op)
      : op_(op) {
    STD_TORCH_CHECK(w1.dim() == 2, op, ": w1 must be (hidden, channels)");
    layers.hidden = w1.size(0);
    layers.w1 = keep(0, w1, layers.hidden * channels);
    layers.b1 = b1 ? keep(1, *b1, layers.hidden) : nullptr;
    layers.w2 = keep(2, w2, channels * layers.hidden);
    layers.b2 = b2 ? keep(3, *b2, channels) : nullptr;
    layers.w3 = w3 ? keep(4, *w3, channels * channels) : nullptr;
  }

  channel_attention::Layers layers{};

 private:
  const float* keep(int slot, const Tensor& t, int64_t size) {
    STD_TORCH_CHECK(t.numel() == size, op_, ": a weight or bias does not fit input's channels");
    kept_[slot] = torch::stable::contiguous(
        t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
    return static_cast<const float*>(kept_[slot]->const_data_ptr());
  }

  const char* op_;
  std::optional<Tensor> kept_[5];
};

void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status == Status::ok, op, ": out of memory for the partial sums");
}

Tensor empty_as(const Tensor& input) {
  return empty_cpu({input.size(0), input.size(1), input.size(2), input.size(3)},
                   input.scalar_type(), is_channels_last(input));
}

Tensor empty_gate(const Tensor& input) {
  return empty_cpu({input.size(0), input.size(1)}, ScalarType::Float, false);
}

// known: z, where something else has summed the input. The output is a new tensor, or the input itself.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const std::optional<Tensor>& known,
                                           bool in_place, const Tensor& w1,
                                           const std::optional<Tensor>& b1, const Tensor& w2,
                                           const std::optional<Tensor>& b2,
                                           const std::optional<Tensor>& w3,
                                           const std::optional<Tensor>& residual, bool relu,
                                           bool residual_relu, const char* op) {
  channel_attention::ForwardParams p{};
  p.shape = shape_of(input, op);
  const Weights weights(w1, b1, w2, b2, w3, p.shape.c, op);
  if (residual) check_like(*residual, input, op, "residual");
  if (known)
    STD_TORCH_CHECK(known->scalar_type() == ScalarType::Float && known->is_contiguous() &&
                        known->numel() == p.shape.n * p.shape.c,
                    op, ": mean must be contiguous float32 numbers, one a channel and image");
  Tensor output = in_place ? input : empty_as(input), mean = known ? *known : empty_gate(input),
         gate = empty_gate(input);
  p.layers = weights.layers;
  p.knows_mean = known.has_value();
  p.input = input.const_data_ptr();
  p.residual = residual ? residual->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.gate = static_cast<float*>(gate.mutable_data_ptr());
  p.relu = relu;
  p.residual_relu = residual_relu;
  check_status(channel_attention::forward(p, torch_threads()), op);
  return {output, mean, gate};
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_forward(
    const Tensor& input, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
    const std::optional<Tensor>& b2, const std::optional<Tensor>& w3,
    const std::optional<Tensor>& residual, bool relu, bool residual_relu) {
  return forward(input, std::nullopt, false, w1, b1, w2, b2, w3, residual, relu, residual_relu,
                 "pywino::_channel_attention_forward");
}

Tensor channel_attention_apply(const Tensor& input, const Tensor& mean, const Tensor& w1,
                               const std::optional<Tensor>& b1, const Tensor& w2,
                               const std::optional<Tensor>& b2, const std::optional<Tensor>& w3,
                               const std::optional<Tensor>& residual, bool relu,
                               bool residual_relu) {
  return std::get<0>(forward(input, mean, false, w1, b1, w2, b2, w3, residual, relu, residual_relu,
                             "pywino::_channel_attention_apply"));
}

void channel_attention_apply_(Tensor input, const Tensor& mean, const Tensor& w1,
                              const std::optional<Tensor>& b1, const Tensor& w2,
                              const std::optional<Tensor>& b2, const std::optional<Tensor>& w3,
                              const std::optional<Tensor>& residual, bool relu,
                              bool residual_relu) {
  forward(input, mean, true, w1, b1, w2, b2, w3, residual, relu, residual_relu,
          "pywino::_channel_attention_apply_");
}

std::tuple<Tensor, Tensor> channel_attention_backward(const Tensor& grad, const Tensor& input,
                                                      const Tensor& mean, const Tensor& gate,
                                                      const Tensor& w1,
                                                      const std::optional<Tensor>& b1,
                                                      const Tensor& w2,
                                                      const std::optional<Tensor>& w3, bool relu) {
  constexpr const char* op = "pywino::_channel_attention_backward";
  channel_attention::BackwardParams p{};
  p.shape = shape_of(input, op);
  const Weights weights(w1, b1, w2, std::nullopt, w3, p.shape.c, op);
  check_like(grad, input, op, "grad");
  for (const Tensor* t : {&mean, &gate})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                        t->numel() == p.shape.n * p.shape.c,
                    op, ": mean and gate must be those of the forward pass");
  Tensor input_gradient = empty_as(input), logit_gradient = empty_gate(input);
  p.layers = weights.layers;
  p.grad = grad.const_data_ptr();
  p.input = input.const_data_ptr();
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.gate = static_cast<const float*>(gate.const_data_ptr());
  p.relu = relu;
  p.input_gradient = input_gradient.mutable_data_ptr();
  p.logit_gradient = static_cast<float*>(logit_gradient.mutable_data_ptr());
  check_status(channel_attention::backward(p, torch_threads()), op);
  return {input_gradient, logit_gradient};
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, CPU, m) {
  m.impl("_channel_attention_forward", TORCH_BOX(&pywino::channel_attention_forward));
  m.impl("_channel_attention_apply", TORCH_BOX(&pywino::channel_attention_apply));
  m.impl("_channel_attention_apply_", TORCH_BOX(&pywino::channel_attention_apply_));
  m.impl("_channel_attention_backward", TORCH_BOX(&pywino::channel_attention_backward));
}
