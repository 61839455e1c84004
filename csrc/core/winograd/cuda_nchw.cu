// SPDX-License-Identifier: BSD-3-Clause
// The input and output transform of NCHW tensors. In V and M channels are neighbours, in the tensor pixels of a row are: so
// pixels come and go along rows, and change places with channels in shared memory.
//
//   tensor   rows of `width` pixels of one channel      a thread has a pixel, for one channel after the other
//   stage    [channel][row][column], fp32               an odd pitch: lanes of neighbouring channels on different banks
//   V, M     [tap][tile][channel]                       a warp has a tile, a lane a channel
//
// A block has a strip, up to 8 tiles that are neighbours in a row of tiles. Of a dilated convolution these are d columns
// apart, and so are the pixels that are read at a time.
//
// Bytes as in cuda_transforms.cu; in the f16 domain the tensor is read twice, the second time from L2, and 8 tiles of F4
// read 34 columns for 32.
#include "cuda_tiles.cuh"

namespace pywino::winograd::cuda {
namespace {

// Where a block's strip lies, and this thread's part of it.
template <int M, int kSize>
struct Strip {
  int tiles, warps_per_tile, channels;  // of a stage: 32 for each of a tile's warps
  int width, pixels, pitch;             // of a channel in the stage
  int64_t first;                        // tile, over the whole batch

  __host__ __device__ explicit Strip(int tiles_)
      : tiles(tiles_), warps_per_tile(kWarps / tiles_), channels(32 * warps_per_tile) {
    width = (tiles - 1) * M + kSize;
    pixels = kSize * width;
    pitch = pixels | 1;
  }
  int stage_bytes() const { return channels * pitch * int(sizeof(float)); }

  // Strips do not go over the end of a row of tiles, and a launch begins and ends anywhere in one.
  __device__ void place(const Tiles& all, int64_t first_tile) {
    const int in_row = (all.columns + tiles - 1) / tiles;
    first = (first_tile / all.columns + blockIdx.x / in_row) * all.columns +
            int64_t(blockIdx.x % in_row) * tiles;
  }
  __device__ int tile() const { return int(threadIdx.x) / 32 / warps_per_tile; }
  // Of this thread in the stage.
  __device__ int channel() const {
    return int(threadIdx.x) / 32 % warps_per_tile * 32 + int(threadIdx.x) % 32;
  }
  // A launch has tiles first_tile ... first_tile + count - 1.
  __device__ bool has(const Tiles& all, int64_t first_tile, int64_t count) const {
    const int64_t index = first + tile();
    return first % all.columns + tile() < all.columns && index >= first_tile &&
           index < first_tile + count;
  }

  // visit(pixel in the stage, row, column, first channel, step) for the pixels that this thread moves. Where there are fewer
  // than threads, groups of threads share the channels.
  template <class Visit>
  __device__ void for_pixels(Visit&& visit) const {
    const int at_once = pixels < kThreads ? pixels : kThreads, group = int(threadIdx.x) / at_once;
    if (group >= groups()) return;
    for (int pixel = int(threadIdx.x) % at_once; pixel < pixels; pixel += at_once)
      visit(pixel, pixel / width, pixel % width, group, groups());
  }
  __device__ int groups() const { return pixels < kThreads ? kThreads / pixels : 1; }
};

// The strip's blocks, one after another over all rows of tiles that a launch has a part of.
dim3 strip_blocks(const Tiles& tiles, int strip, int64_t first, int64_t count) {
  const int64_t rows = (first + count - 1) / tiles.columns - first / tiles.columns + 1;
  return blocks(rows * ((tiles.columns + strip - 1) / strip));
}

// 8 tiles, or the power of two from which on a whole row of tiles fits.
int strip_of(const Tiles& tiles) {
  int strip = 1;
  while (strip < kWarps && strip < tiles.columns) strip *= 2;
  return strip;
}

template <class From, class In, class Out>
__global__ void __launch_bounds__(kThreads, From::kTile == 6 ? 1 : 2)
    input_transform_nchw(InputTransform p, int tiles_of_strip) {
  constexpr int M = From::kTile, A = From::A, kSize = From::kSize;
  constexpr bool kScaled = std::is_same_v<Out, __half>;
  PYWINO_DYNAMIC_SHARED(float, stage);
  Strip<M, kSize> strip(tiles_of_strip);
  strip.place(p.tiles, p.first);
  const bool exists = strip.has(p.tiles, p.first, p.count);
  const int64_t tile = strip.first + strip.tile() - p.first;
  const auto patch =
      patch_of<M, 1, In>(p.input, p.map, p.tiles, position(p.tiles, strip.first), p.pad_h, p.pad_w);
  // use(pixel in the stage, the pixel's first channel or nullptr where there is no such pixel, first channel, step)
  const auto for_pixels = [&](auto&& use) {
    strip.for_pixels([&](int pixel, int row, int column, int channel, int step) {
      const int y = patch.y + row * patch.step_y, x = patch.x + column * patch.step_x;
      const bool inside = y >= 0 && y < patch.height && x >= 0 && x < patch.width;
      use(pixel, inside ? patch.origin + y * patch.stride_h + x : nullptr, channel, step);
    });
  };

  float scale = 1.f;
  if (kScaled && !p.peaks) {
    for_pixels([&](int pixel, const In* from, int channel, int step) {
      float top = 0.f;
      if (from)
        for (int64_t c = channel; c < p.map.c; c += step)
          top = fmaxf(top, fabsf(to_float(from[c * patch.stride_c])));
      stage[channel * strip.pixels + pixel] = top;
    });
    __syncthreads();
    float top = 0.f;
    for (int e = int(threadIdx.x) % 32; e < strip.groups() * kSize * kSize; e += 32)
      top = fmaxf(top, stage[e / (kSize * kSize) * strip.pixels + e / kSize % kSize * strip.width +
                             strip.tile() * M + e % kSize]);
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    const int exponent = exponent_above(top, From::kGrowth);
    scale = power_of_two(-exponent);
    if (exists && strip.channel() == 0) p.scale[tile] = power_of_two(exponent);
    __syncthreads();
  }

  for (int64_t c0 = 0; c0 < p.channels; c0 += strip.channels) {
    for_pixels([&](int pixel, const In* from, int channel, int step) {
      for (; channel < strip.channels; channel += step)
        stage[channel * strip.pitch + pixel] =
            from && c0 + channel < p.map.c ? to_float(from[(c0 + channel) * patch.stride_c]) : 0.f;
    });
    __syncthreads();
    const int64_t c = c0 + strip.channel();
    if (exists && c < p.channels) {
      const float* d = stage + strip.channel() * strip.pitch + strip.tile() * M;
      Channels<1> columns[A][kSize];  // X d
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        Channels<1> column[kSize], o[A];
#pragma unroll
        for (int i = 0; i < kSize; ++i) column[i].x[0] = d[i * strip.width + j];
        From::transform(column, o);
#pragma unroll
        for (int i = 0; i < A; ++i) columns[i][j] = o[i];
      }
      const bool by_channel = kScaled && p.peaks && c < p.map.c;
      const float scales[] = {by_channel ? power_of_two(-exponent_above(p.peaks[c], From::kGrowth))
                                         : scale};
      store_in_domain<From>(columns, scales, p.relu, static_cast<Out*>(p.v) + tile * p.channels + c,
                            p.count * p.channels);
    }
    __syncthreads();
  }
}

template <int M, class Out, class In>
__global__ void __launch_bounds__(kThreads, 2)
    output_transform_nchw(OutputTransform p, int tiles_of_strip) {
  constexpr int A = Transform<M>::A;
  PYWINO_DYNAMIC_SHARED(float, stage);
  Strip<M, M> strip(tiles_of_strip);
  strip.place(p.tiles, p.first);
  const int64_t tile = strip.first + strip.tile() - p.first;
  const int64_t k0 = int64_t(blockIdx.y) * strip.channels, k = k0 + strip.channel();
  if (strip.has(p.tiles, p.first, p.count) && k < p.map.c) {
    Channels<1> columns[M][A];  // A^T M
    load_from_domain<M>(static_cast<const In*>(p.m) + tile * p.channels + k, p.count * p.channels,
                        columns);
    const float scale = std::is_same_v<In, __half> ? p.tile_scale[tile] * p.filter_scale[k] : 1.f;
    const float bias = p.bias ? p.bias[k] : 0.f;
    float* to = stage + strip.channel() * strip.pitch + strip.tile() * M;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      Channels<1> o[M];
      Transform<M>::output(columns[i], o);
#pragma unroll
      for (int j = 0; j < M; ++j) to[i * strip.width + j] = o[j].x[0] * scale + bias;
    }
  }
  __syncthreads();

  const Position at = position(p.tiles, strip.first);
  const int64_t channels = p.map.c - k0 < strip.channels ? p.map.c - k0 : strip.channels;
  const Out* residual = static_cast<const Out*>(p.residual);
  Out* output = static_cast<Out*>(p.output);
  strip.for_pixels([&](int pixel, int row, int column, int channel, int step) {
    const int64_t index = strip.first + column / M;
    const int64_t y = int64_t(at.row * M + row) * p.tiles.dil_h + at.phase_h;
    const int64_t x = int64_t(at.column * M + column) * p.tiles.dil_w + at.phase_w;
    if (y >= p.map.h || x >= p.map.w || index < p.first || index >= p.first + p.count) return;
    int64_t place =
        at.n * p.map.stride_n + y * p.map.stride_h + x + (k0 + channel) * p.map.stride_c;
    for (; channel < channels; channel += step, place += step * p.map.stride_c) {
      float sum = stage[channel * strip.pitch + pixel];
      if (residual) sum += to_float(residual[place]);
      if (p.relu) sum = sum < 0.f ? 0.f : sum;  // NaN stays
      output[place] = from_float<Out>(sum);
    }
  });
}

template <class Kernel>
bool allow_shared(Kernel* kernel, int bytes) {
  return !cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

extern "C" int pywino_winograd_input_transform_nchw(const InputTransform* p, void* stream) {
  const int strip = strip_of(p->tiles);
  const dim3 grid = strip_blocks(p->tiles, strip, p->first, p->count);
  bool known = true;
  known &= with_tile(p->tiles.size, [&](auto tile) {
    constexpr int M = decltype(tile)::value;
    const auto launch_as = [&](auto from) {
      using From = typename decltype(from)::type;
      const int bytes = Strip<M, From::kSize>(strip).stage_bytes();
      known &= with_types(p->dtype, p->domain, [&](auto in, auto out) {
        using In = typename decltype(in)::type;
        using Out = typename decltype(out)::type;
        if (allow_shared(input_transform_nchw<From, In, Out>, bytes))
          PYWINO_LAUNCH((input_transform_nchw<From, In, Out>), grid, dim3(kThreads), bytes,
                        static_cast<cudaStream_t>(stream), *p, strip);
      });
    };
    p->gradient ? launch_as(Type<OutputTiles<M>>{}) : launch_as(Type<Patches<M>>{});
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

extern "C" int pywino_winograd_output_transform_nchw(const OutputTransform* p, void* stream) {
  const int strip = strip_of(p->tiles);
  bool known = true;
  known &= with_tile(p->tiles.size, [&](auto tile) {
    constexpr int M = decltype(tile)::value;
    const Strip<M, M> shape(strip);
    dim3 grid = strip_blocks(p->tiles, strip, p->first, p->count);
    grid.y = unsigned((p->map.c + shape.channels - 1) / shape.channels);
    known &= with_types(p->dtype, p->domain, [&](auto out, auto in) {
      using Out = typename decltype(out)::type;
      using In = typename decltype(in)::type;
      if (allow_shared(output_transform_nchw<M, Out, In>, shape.stage_bytes()))
        PYWINO_LAUNCH((output_transform_nchw<M, Out, In>), grid, dim3(kThreads),
                      shape.stage_bytes(), static_cast<cudaStream_t>(stream), *p, strip);
    });
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

}  // namespace pywino::winograd::cuda
