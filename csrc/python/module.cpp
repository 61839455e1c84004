// SPDX-License-Identifier: BSD-3-Clause
// pywino._host: what Python asks the torch-free core, which instruction sets were built and which
// run here, the transform matrices, operation counts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/common/isa.h"
#include "core/common/scratch.h"
#ifdef PYWINO_HAVE_CUDA
#include "core/winograd/cuda.h"
#endif
#include "core/winograd/winograd.h"

namespace py = pybind11;
namespace winograd = pywino::winograd;
using pywino::Isa;

namespace {

// Best first, as far as `keep` wants them.
template <typename Keep>
std::vector<std::string> isa_names(Keep keep) {
  std::vector<std::string> names;
  for (int i = pywino::kIsaCount - 1; i >= 0; --i)
    if (keep(Isa(i))) names.push_back(pywino::isa_name(Isa(i)));
  return names;
}

std::vector<std::string> built_isas() { return isa_names(pywino::isa_built); }

std::vector<std::string> isas() {
  return isa_names([](Isa isa) { return pywino::isa_built(isa) && pywino::isa_runs(isa); });
}

void force_isa(const std::optional<std::string>& name) {
  if (!name) return pywino::release_isa();
  for (int i = 0; i < pywino::kIsaCount; ++i)
    if (*name == pywino::isa_name(Isa(i)) && pywino::force_isa(Isa(i))) return;
  std::string choices;
  for (const auto& choice : isas()) choices += (choices.empty() ? "'" : ", '") + choice + "'";
  throw py::value_error(
      "pywino.force_isa: name must be None or an instruction set that is "
      "built and runs here (" +
      choices + "), got '" + *name + "'; `pywino doctor` says why it is missing");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PYWINO_COMPILER;
  info["build_type"] = PYWINO_BUILD_TYPE;
  info["isas"] = built_isas();
  return info;
}

void check_tile(const char* function, int tile) {
  if (winograd::tile_exists(tile)) return;
  throw py::value_error(std::string("pywino._host.") + function + ": tile must be 2, 4 or 6, got " +
                        std::to_string(tile));
}

struct Matrices {
  int tile, patch;
  std::vector<double> bt, g, at;  // (patch, patch), (patch, 3), (tile, patch)

  explicit Matrices(int tile)
      : tile(tile), patch(tile + 2), bt(patch * patch), g(patch * 3), at(tile * patch) {
    winograd::transform_matrices(tile, bt.data(), g.data(), at.data());
  }
};

py::array_t<double> to_numpy(const std::vector<double>& values, int rows, int columns) {
  py::array_t<double> array({rows, columns});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

std::tuple<py::array_t<double>, py::array_t<double>, py::array_t<double>> transform_matrices(
    int tile) {
  check_tile("transform_matrices", tile);
  const Matrices m(tile);
  return {to_numpy(m.bt, m.patch, m.patch), to_numpy(m.g, m.patch, 3),
          to_numpy(m.at, tile, m.patch)};
}

// Additions in (matrix times vector): in each row one fewer than it has entries that are not zero.
int64_t additions(const std::vector<double>& matrix, int columns) {
  int64_t count = 0;
  for (auto row = matrix.begin(); row != matrix.end(); row += columns)
    count += std::max<int64_t>(0, columns - std::count(row, row + columns, 0.0) - 1);
  return count;
}

// Tiles that cover `size` outputs, which dilation splits into `dilation` interleaved grids.
int64_t tiles_along(int64_t size, int tile, int64_t dilation) {
  int64_t count = 0;
  for (int64_t grid = 0; grid < std::min(dilation, size); ++grid) {
    const int64_t outputs = (size - grid + dilation - 1) / dilation;
    count += (outputs + tile - 1) / tile;
  }
  return count;
}

py::dict operation_count(int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int tile,
                         int64_t dilation) {
  check_tile("operation_count", tile);
  if (std::min({n, c, h, w, k}) < 0 || dilation < 1)
    throw py::value_error("pywino._host.operation_count: sizes must be >= 0 and dilation >= 1");
  const Matrices m(tile);
  const int64_t a = m.patch;
  const int64_t tiles = n * tiles_along(h, tile, dilation) * tiles_along(w, tile, dilation);
  py::dict count;
  count["tiles"] = tiles;
  count["direct_multiplications"] = n * h * w * k * c * 9;
  count["winograd_multiplications"] = tiles * a * a * k * c;
  // A two-dimensional transform is the matrix on every column, then on every row of the result.
  count["input_additions"] = tiles * c * additions(m.bt, a) * (a + a);
  count["filter_additions"] = k * c * additions(m.g, 3) * (3 + a);
  count["output_additions"] = tiles * k * additions(m.at, a) * (a + tile);
  return count;
}

#ifdef PYWINO_HAVE_CUDA
std::pair<int, int> cuda_versions() {
  int driver = 0, library = 0;
  if (const int error = winograd::cuda::pywino_cuda_versions(&driver, &library))
    throw std::runtime_error(std::string("pywino._host.cuda_versions: ") +
                             winograd::cuda::pywino_cuda_error(error));
  return {driver, library};
}

std::optional<std::string> why_no_wgmma() {
  const char* why = winograd::cuda::pywino_winograd_why_no_wgmma();
  return why ? std::optional<std::string>(why) : std::nullopt;
}
#endif

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "pywino's torch-free core: build information, instruction sets, transforms, counts.";
  m.def("build_info", &build_info,
        "Compiler, build type and the instruction sets that were built.");
  m.def("built_isas", &built_isas, "Instruction sets in this build, best first.");
  m.def("isas", &isas, "Instruction sets in this build that this processor runs, best first.");
  m.def(
      "isa", [] { return std::string(pywino::isa_name(pywino::isa())); },
      "The instruction set in force.");
  m.def("force_isa", &force_isa, py::arg("name").none(true),
        "Puts one instruction set in force for the process; None returns to the best one.\n\n"
        "Raises ValueError, which names the choices, where it is not built or does not run.");
  m.def("scratch_bytes", &pywino::scratch_bytes,
        "Bytes of scratch memory that the calling thread keeps for the kernels.");
  m.def("transform_matrices", &transform_matrices, py::arg("tile"),
        "(B^T, G, A^T) of F(tile x tile, 3x3) as float64 arrays of shapes (tile+2, tile+2),\n"
        "(tile+2, 3) and (tile, tile+2). Raises ValueError for a tile that does not exist.");
  m.def(
      "operation_count", &operation_count, py::arg("n"), py::arg("c"), py::arg("h"), py::arg("w"),
      py::arg("k"), py::arg("tile"), py::arg("dilation") = 1,
      "Operations of a 3x3 convolution of an (n, c) input to an (n, k, h, w) output (h and w are\n"
      "the output's), padded tiles included.\n\n"
      "direct_multiplications    of the plain form\n"
      "winograd_multiplications  of the products in the Winograd domain\n"
      "input_, filter_ and output_additions  of the transforms, from the entries of their\n"
      "matrices that are not zero; common subexpressions, which the kernels share, are not.\n"
      "tiles                     of the whole output");
#ifdef PYWINO_HAVE_CUDA
  m.def("cuda_versions", &cuda_versions,
        "(driver, library): the newest CUDA that the driver runs, 0 without one, and the one that\n"
        "the kernels were built with; 13000 is 13.0.");
  m.def("why_no_wgmma", &why_no_wgmma,
        "None where large fp16 products of the current device are wgmma's, else why they are\n"
        "mma.sync's.");
  m.def("allow_wgmma", &winograd::cuda::pywino_winograd_allow_wgmma, py::arg("allowed"),
        "For the process: False has mma.sync for all products. For tests and benches.");
#endif
}
