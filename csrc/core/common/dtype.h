// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace pywino {

enum class DType : int { f32, bf16, f16 };

}  // namespace pywino
