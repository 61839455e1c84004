// SPDX-License-Identifier: BSD-3-Clause
// Prints layouts.json: where CuTe says that the operands of the instructions lie. The tests hold the emulator to it. Needs
// CuTe's headers (PyPI nvidia-cutlass 4.2.0, in cutlass_library/source/include), which nothing else here does:
//   g++ -std=c++20 -I <CuTe> -I <CUDA> -I <CUDA>/cccl tests/emulator/tables/make_layouts.cpp -o make_layouts
//   ./make_layouts | grep -v ERROR > tests/emulator/tables/layouts.json
// (CuTe prints the error where a descriptor is made of a shared address on the host; the address, 0, is what is meant.)
//
// A layout is CuTe's (shape):(stride), a function of (thread, value) or (row, k); what it returns is said beside it.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
namespace gmma = SM90::GMMA;

template <class Layout>
void line(const char* name, Layout layout, const char* end = ",") {
  std::printf("    \"%s\": \"", name);
  print(layout);
  std::printf("\"%s\n", end);
}

// (lane, value) -> m + M k, n + N k, m + M n
template <class Operation>
void mma(const char* name) {
  using Traits = MMA_Traits<Operation>;
  std::printf("  \"%s\": {\n", name);
  line("shape_mnk", typename Traits::Shape_MNK{});
  line("a", typename Traits::ALayout{});
  line("b", typename Traits::BLayout{});
  line("d", typename Traits::CLayout{}, "");
  std::printf("  },\n");
}

// (lane, bit) -> bit, for what the lanes name and for what they get
template <class Operation>
void ldmatrix(const char* name) {
  using Traits = Copy_Traits<Operation>;
  std::printf("  \"%s\": {\n", name);
  line("source", typename Traits::SrcLayout{});
  line("destination", typename Traits::DstLayout{}, "");
  std::printf("  },\n");
}

// (thread of the warpgroup, value) -> m + 64 k, m + 64 n
template <class Operation>
void wgmma(const char* name) {
  using Traits = MMA_Traits<Operation>;
  std::printf("  \"%s\": {\n", name);
  line("shape_mnk", typename Traits::Shape_MNK{});
  line("a_in_registers", typename Traits::ALayout{});
  line("d", typename Traits::CLayout{}, "");
  std::printf("  },\n");
}

// Byte offsets of the 16-byte chunks of a K-major tile of two atoms of 8 rows, row by row, and its descriptor.
template <class Atom, class Element>
void tile(const char* name, Atom atom, Element, const char* end = ",") {
  constexpr int columns = decltype(size<1>(atom))::value;
  const auto swizzled = tile_to_shape(atom, Shape<_16, Int<columns>>{});
  const auto layout = as_position_independent_swizzle_layout(swizzled);
  std::printf("  \"%s\": {\n    \"offsets\": [\n", name);
  for (int row = 0; row < 16; ++row) {
    std::printf("      [");
    for (int k = 0; k < columns; k += 16 / sizeof(Element)) {
      std::printf("%s%d", k ? ", " : "", int(layout(row, k)) * int(sizeof(Element)));
    }
    std::printf("]%s\n", row < 15 ? "," : "");
  }
  constexpr int depth = 32 / sizeof(Element);
  const auto first = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)),
                                 composition(swizzled, Shape<_16, Int<depth>>{}));
  const auto descriptor = gmma::make_gmma_desc<gmma::Major::K>(first);
  std::printf("    ],\n    \"descriptor\": \"%016llx\"\n  }%s\n",
              static_cast<unsigned long long>(descriptor.desc_), end);
}

int main() {
  std::printf("{\n");
  mma<SM80_16x8x16_F32F16F16F32_TN>("mma_m16n8k16_f16");
  mma<SM80_16x8x16_F32BF16BF16F32_TN>("mma_m16n8k16_bf16");
  mma<SM80_16x8x8_F32TF32TF32F32_TN>("mma_m16n8k8_tf32");
  ldmatrix<SM75_U32x4_LDSM_N>("ldmatrix_x4");
  ldmatrix<SM75_U16x8_LDSM_T>("ldmatrix_x4_trans");
  using gmma::Major;
  wgmma<SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, Major::K>>("wgmma_m64n64k16_f16");
  wgmma<SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::K>>("wgmma_m64n128k16_bf16");
  wgmma<SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, Major::K>>("wgmma_m64n256k16_f16");
  wgmma<SM90::GMMA::MMA_64x64x8_F32TF32TF32_RS_TN<>>("wgmma_m64n64k8_tf32");
  tile("tile_128b_f16", gmma::Layout_K_SW128_Atom<half_t>{}, half_t{});
  tile("tile_64b_f16", gmma::Layout_K_SW64_Atom<half_t>{}, half_t{});
  tile("tile_32b_f16", gmma::Layout_K_SW32_Atom<half_t>{}, half_t{});
  tile("tile_128b_tf32", gmma::Layout_K_SW128_Atom<tfloat32_t>{}, tfloat32_t{}, "");
  std::printf("}\n");
}
