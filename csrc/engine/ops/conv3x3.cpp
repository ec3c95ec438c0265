// conv3x3: the 3x3 convolution of ADM's networks with everything that surrounds it, by Winograd's
// minimal filtering.
//
// Three phases per block of tiles: input transform (gather, affine, SiLU, resampling, padding), one
// matrix product per plane of the transform (gemm.h), output transform (bias, residual, scale,
// moments). Where there are blocks enough each thread takes whole blocks, whose V and M stay in its
// own cache; else the threads share the phases of one block. Neither changes a bit: every element
// is the same sequence of operations however the tiles are cut.
#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/gemm.h"
#include "engine/op.h"
#include "engine/ops/channel_stats.h"
#include "engine/ops/conv3x3_kernels.h"
#include "engine/ops/conv3x3_winograd.h"
#include "engine/ops/thread_scratch.h"

namespace adm_rt::engine {
namespace {

// Tiles of a block, up to a strip more or less: the weights are read once per block, while V and M
// stay near. Blocks are equal, or the last one would read all weights for a few tiles.
constexpr int64_t kBlockTiles = 64;
// Threads take equal blocks of their own when those have so many tiles.
constexpr int64_t kMinBlockTiles = 24;
// As many tiles as this take no longer than reading the transformed weights from memory.
constexpr int64_t kTilesPerWeightRead = 9;
// With so few output channels a product costs next to nothing, and these are the last layers, whose
// rounding errors nothing dilutes; with so few input channels the direct convolution's rounding
// errors are far below those of F(4x4), and a network must stay within twice of them. Both take the
// most exact tile, F(2x2).
constexpr int64_t kFewChannelsOut = 16;
constexpr int64_t kFewChannelsIn = 32;
// F(4x2), the tile of 8x8 images, only for more input channels than these: small networks, whose
// errors are nearest to that bound, keep F(2x2) there.
constexpr int64_t kFewChannelsIn4x2 = 128;
// F(6x6) only on images of this size.
constexpr int64_t kMinFastEdge = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats from chunk to chunk of V or M, and from plane to plane: whole cache lines, and not so even
// a number of them that what is touched at once, the same tiles of many chunks by the products, of
// all planes by the transforms, falls into the same sets of the cache.
int64_t chunk_floats(int64_t tiles) { return (tiles + 8) * kConvChunk; }
int64_t plane_floats(int64_t tiles, int64_t chunks) {
  return ceil_div(chunks * chunk_floats(tiles), 1024) * 1024 + kConvChunk;
}

// Sets the tile with the fewest products. A layer of few tiles waits for its weights, of which a
// larger tile has more. By the layer's shape alone: an image must not depend on its batch.
void choose_tile(Conv3x3Shape& s, bool fast) {
  const int64_t channels_in = s.channels1 + s.channels2;
  const bool large = fast && s.height >= kMinFastEdge && s.width >= kMinFastEdge;
  int64_t best = 0;
  const auto choose = [&](int64_t down, int64_t along) {
    const int64_t height = outputs_of(down), width = outputs_of(along);
    const int64_t rows = ceil_div(s.height, height), columns = ceil_div(s.width, width);
    const int64_t cost = down * along * std::max(rows * columns, kTilesPerWeightRead);
    if (best > 0 && cost >= best) return;
    best = cost;
    s.products_down = down;
    s.products_along = along;
    s.tile_height = height;
    s.tile_width = width;
    s.tile_rows = rows;
    s.tile_columns = columns;
  };
  if (s.resample == Resample::kNearestUp) return choose(kUpProducts, kUpProducts);
  choose(4, 4);
  if (channels_in <= kFewChannelsIn || s.channels_out <= kFewChannelsOut) return;
  if (channels_in > kFewChannelsIn4x2) choose(6, 4);
  choose(6, 6);
  if (large) choose(8, 8);
}

Resample resample_of(const OpArguments& arguments, const char* name) {
  const int64_t value = arguments.integer(name, 0);
  ADM_RT_CHECK(value >= 0 && value <= 2, "conv3x3: ", name, "=", value,
               " is not 0 (none), 1 (2x2 average pool) or 2 (nearest up-sampling by 2)");
  return static_cast<Resample>(value);
}

// `in` must become height x width by `resample`.
void check_resampled(const char* name, const Shape& in, Resample resample, const Shape& y) {
  const bool fits = resample == Resample::kNone ? in.height == y.height && in.width == y.width
                    : resample == Resample::kNearestUp
                        ? 2 * in.height == y.height && 2 * in.width == y.width
                        : in.height / 2 == y.height && in.width / 2 == y.width;
  ADM_RT_CHECK(fits, "conv3x3: ", name, " is ", to_string(in), " and y ", to_string(y),
               "; with resample ", static_cast<int64_t>(resample),
               " (0 none, 1 pool, 2 up) their sizes do not fit");
}

// y = (conv(pad(resample(act(a * [x, x2] + b)))) + bias + resample(residual)) * output_scale, with
// padding 1 and stride 1.
//
// Inputs: x {h, w, C1}, x2 {h, w, C2}?, affine {1, 2, C1 + C2}? (row 0 a, row 1 b), residual
// {.., .., Co}?. Outputs: y {H, W, Co}, stats {1, 2, Co}? (mean, biased variance).
// Weights: weight [Co, C1 + C2, 3, 3], bias [Co]?. Attributes: activation (0 none, 1 silu),
// resample and residual_resample (0 none, 1 2x2 average pool, 2 nearest up-sampling by 2),
// output_scale (1), fast (0; 1 allows F(6x6), of about four times the rounding error, from 64x64).
class Conv3x3 : public Op {
 public:
  explicit Conv3x3(const OpArguments& arguments)
      : x_(arguments.input("x")),
        x2_(arguments.optional_input("x2")),
        affine_(arguments.optional_input("affine")),
        residual_(arguments.optional_input("residual")),
        y_(arguments.output("y")),
        stats_(arguments.optional_output("stats")),
        has_bias_(arguments.has_weight("bias")),
        isa_(cpu_isa()),
        panel_width_(ADM_RT_DISPATCH(gemm_panel_width())) {
    const Shape& x = arguments.input_shape(x_);
    const Shape& y = arguments.output_shape(y_);
    ADM_RT_CHECK(x.floats() >= 1 && y.floats() >= 1, "conv3x3: x is ", to_string(x), " and y ",
                 to_string(y), "; neither may be empty");
    Conv3x3Shape& s = shape_;
    s.height = y.height;
    s.width = y.width;
    s.in_height = x.height;
    s.in_width = x.width;
    s.channels1 = x.channels;
    s.channels_out = y.channels;
    s.resample = resample_of(arguments, "resample");
    s.residual_resample = resample_of(arguments, "residual_resample");
    check_resampled("x", x, s.resample, y);
    if (x2_ >= 0) {
      const Shape& x2 = arguments.input_shape(x2_);
      ADM_RT_CHECK(x2.height == x.height && x2.width == x.width && x2.channels >= 1,
                   "conv3x3: x is ", to_string(x), " and x2 ", to_string(x2),
                   "; they must have the same height and width");
      s.channels2 = x2.channels;
    }
    const int64_t channels_in = s.channels1 + s.channels2;
    ADM_RT_CHECK(affine_ < 0 || arguments.input_shape(affine_) == (Shape{1, 2, channels_in}),
                 "conv3x3: affine is not 1x2x", channels_in);
    if (residual_ >= 0) {
      const Shape& residual = arguments.input_shape(residual_);
      ADM_RT_CHECK(residual.channels == y.channels, "conv3x3: residual is ", to_string(residual),
                   " and y ", to_string(y), "; they must have as many channels");
      check_resampled("residual", residual, s.residual_resample, y);
      s.residual_height = residual.height;
      s.residual_width = residual.width;
    }
    if (stats_ >= 0) check_stats_shape(arguments, arguments.output_shape(stats_), y);
    const int64_t activation = arguments.integer("activation", 0);
    ADM_RT_CHECK(activation == 0 || activation == 1, "conv3x3: activation=", activation,
                 " is not 0 (none) or 1 (silu)");
    s.silu = activation == 1;
    s.output_scale = static_cast<float>(arguments.number("output_scale", 1.0));
    ADM_RT_CHECK((arguments.weight_shape("weight") ==
                  std::vector<int64_t>{s.channels_out, channels_in, 3, 3}),
                 "conv3x3: weight must have the shape [", s.channels_out, ", ", channels_in,
                 ", 3, 3]");
    ADM_RT_CHECK(
        !has_bias_ || arguments.weight_shape("bias") == std::vector<int64_t>{s.channels_out},
        "conv3x3: bias must have the shape [", s.channels_out, "]");

    choose_tile(s, arguments.integer("fast", 0) != 0);
    s.strip_tiles = std::min(kConvSegmentPixels / s.tile_width / 2 * 2, s.tile_columns);
    s.segments = s.tile_rows * ceil_div(s.tile_columns, s.strip_tiles);
    depth_ = conv3x3_input_chunks(s) * kConvChunk;
    weight_plane_ = gemm_packed_floats(s.channels_out, depth_, panel_width_);
    input_shape_ = s;
    if (s.resample == Resample::kNearestUp) {
      input_shape_.tile_height = input_shape_.tile_width = 2;
      input_shape_.products_down = input_shape_.products_along = 4;
      input_shape_.height = s.in_height;
      input_shape_.width = s.in_width;
      input_shape_.resample = Resample::kNone;
    }
  }

  int64_t packed_floats() const override {
    return shape_.planes() * weight_plane_ + (has_bias_ ? shape_.channels_out : 0);
  }

  void pack(const Weights& weights, float* packed) const override {
    const float* weight = weights.at("weight");
    parallel_for(ceil_div(shape_.channels_out, panel_width_), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        float* to = packed + panel * depth_ * panel_width_;
        ADM_RT_DISPATCH(conv3x3_weights(shape_, weight, panel * panel_width_, to, weight_plane_));
      }
    });
    if (!has_bias_) return;
    const float* bias = weights.at("bias");
    std::copy(bias, bias + shape_.channels_out, packed + shape_.planes() * weight_plane_);
  }

  int64_t scratch_floats(int64_t batch) const override {
    return stats_ < 0 ? 0 : batch * shape_.segments * 2 * shape_.channels_out;
  }

  // V and M of a block: whole segments, so up to a strip more than kBlockTiles.
  int64_t thread_floats() const override {
    const int64_t tiles = ceil_div(kBlockTiles, shape_.strip_tiles) * shape_.strip_tiles;
    return input_shape_.planes() * plane_floats(tiles, conv3x3_input_chunks(shape_)) +
           shape_.planes() * plane_floats(tiles, conv3x3_output_chunks(shape_));
  }

  void run(const RunContext& context) const override {
    ADM_RT_CHECK(cpu_isa() == isa_, "conv3x3: the weights are packed for ", name_of(isa_),
                 ", not for ", name_of(cpu_isa()), "; make the plan anew");
    Conv3x3Tensors t;
    t.x = context.input(x_);
    t.x2 = context.input(x2_);
    t.affine = context.input(affine_);
    t.residual = context.input(residual_);
    t.bias = has_bias_ ? context.packed + shape_.planes() * weight_plane_ : nullptr;
    t.y = context.output(y_);
    t.moments = stats_ < 0 ? nullptr : context.scratch;

    const int64_t threads = num_threads(), segments = context.batch * shape_.segments;
    const int64_t tiles = context.batch * shape_.tile_rows * shape_.tile_columns;
    const int64_t block_segments = ceil_div(kBlockTiles, shape_.strip_tiles);
    int64_t blocks = ceil_div(segments, block_segments);
    const int64_t shared_out = ceil_div(blocks, threads) * threads;
    const bool own_blocks = threads > 1 && tiles >= kMinBlockTiles * shared_out;
    if (own_blocks) blocks = std::min(shared_out, segments);
    const auto run_blocks = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        run_block(t, context.packed, segments * block / blocks, segments * (block + 1) / blocks,
                  own_blocks ? 1 : threads);
      }
    };
    if (own_blocks) {
      parallel_for(blocks, 1, run_blocks);  // parallel_for inside runs inline
    } else {
      run_blocks(0, blocks);
    }
    if (stats_ >= 0) {
      join_moments(t.moments, context.batch, context.output(stats_));
    }
  }

  double flops(int64_t batch) const override {
    return 18.0 * static_cast<double>(batch * shape_.height * shape_.width) *
           static_cast<double>((shape_.channels1 + shape_.channels2) * shape_.channels_out);
  }

 private:
  void run_block(const Conv3x3Tensors& t, const float* packed, int64_t segment_begin,
                 int64_t segment_end, int64_t threads) const {
    const Conv3x3Shape& s = shape_;
    Conv3x3Block block;
    block.segment_begin = segment_begin;
    block.segment_end = segment_end;
    block.tiles = conv3x3_tiles_before(s, segment_end) - conv3x3_tiles_before(s, segment_begin);
    block.chunk = chunk_floats(block.tiles);
    block.v_plane = plane_floats(block.tiles, conv3x3_input_chunks(s));
    block.m_plane = plane_floats(block.tiles, conv3x3_output_chunks(s));
    block.v = thread_scratch(input_shape_.planes() * block.v_plane + s.planes() * block.m_plane);
    block.m = block.v + input_shape_.planes() * block.v_plane;

    // Input: by chunks of channels, and by segments where that leaves threads without work.
    const int64_t chunks = conv3x3_input_chunks(s), segments = segment_end - segment_begin;
    const int64_t groups = std::min(segments, threads == 1 ? 1 : ceil_div(2 * threads, chunks));
    parallel_for(chunks * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task % groups;
        ADM_RT_DISPATCH(conv3x3_input(input_shape_, t, block, task / groups,
                                      segment_begin + segments * group / groups,
                                      segment_begin + segments * (group + 1) / groups));
      }
    });

    const int64_t panels = ceil_div(s.channels_out, panel_width_);
    parallel_for(s.planes() * panels, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // the panels of one plane
        const int64_t plane = begin / panels, panel = begin % panels;
        const int64_t stop = std::min(end, (plane + 1) * panels);
        const int64_t column = panel * panel_width_;
        const int64_t columns = std::min(s.channels_out - column, (stop - begin) * panel_width_);
        const float* v = input_plane(block, plane);
        float* m = block.m + plane * block.m_plane + column / kConvChunk * block.chunk;
        ADM_RT_DISPATCH(gemm(block.tiles, columns, depth_, {v, kConvChunk, block.chunk},
                             packed + plane * weight_plane_ + column * depth_,
                             {m, kConvChunk, block.chunk}, false, GemmChains::kPrecise,
                             stop < end ? input_plane(block, plane + 1) : nullptr));
        begin = stop;
      }
    });

    const int64_t out_chunks = conv3x3_output_chunks(s);
    parallel_for(out_chunks * segments, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // the segments of one chunk
        const int64_t chunk = begin / segments, first = begin % segments;
        const int64_t stop = std::min(end, (chunk + 1) * segments);
        ADM_RT_DISPATCH(conv3x3_output(s, t, block, chunk, segment_begin + first,
                                       segment_begin + first + stop - begin));
        begin = stop;
      }
    });
  }

  // The plane of V that plane `plane` of the products is of.
  const float* input_plane(const Conv3x3Block& block, int64_t plane) const {
    const int64_t row = input_of(shape_.products_down, plane / shape_.products_along);
    const int64_t column = input_of(shape_.products_along, plane % shape_.products_along);
    return block.v + (row * input_shape_.products_along + column) * block.v_plane;
  }

  // Mean and variance of every channel from the moments of the segments (Chan, Golub & LeVeque
  // 1979), in order and in double.
  void join_moments(const float* moments, int64_t batch, float* stats) const {
    const Conv3x3Shape& s = shape_;
    const int64_t channels = s.channels_out, chunks = conv3x3_output_chunks(s);
    parallel_for(batch * chunks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / chunks, first = task % chunks * kConvChunk;
        const int64_t count = std::min(kConvChunk, channels - first);
        double mean[kConvChunk] = {}, square[kConvChunk] = {};
        const float* from = moments + image * s.segments * 2 * channels + first;
        const double all = static_cast<double>(s.height * s.width);
        for (int64_t i = 0; i < s.segments; ++i) {
          const double share = pixels_of(i) / all;
          const float* segment = from + i * 2 * channels;
          for (int64_t c = 0; c < count; ++c) mean[c] += share * segment[c];
        }
        for (int64_t i = 0; i < s.segments; ++i) {
          const double pixels = pixels_of(i);
          const float* segment = from + i * 2 * channels;
          for (int64_t c = 0; c < count; ++c) {
            const double d = segment[c] - mean[c];
            square[c] += segment[channels + c] + pixels * d * d;
          }
        }
        float* to = stats + image * 2 * channels + first;
        for (int64_t c = 0; c < count; ++c) {
          to[c] = static_cast<float>(mean[c]);
          to[channels + c] = static_cast<float>(square[c] / all);
        }
      }
    });
  }

  double pixels_of(int64_t segment) const {
    return static_cast<double>(conv3x3_segment_pixels(shape_, conv3x3_segment(shape_, segment)));
  }

  const int x_, x2_, affine_, residual_, y_, stats_;
  const bool has_bias_;
  const CpuIsa isa_;
  const int64_t panel_width_;
  Conv3x3Shape shape_;
  Conv3x3Shape input_shape_;  // as the input transform sees it
  int64_t depth_ = 0;         // of the products: input channels, every chunk a whole one
  int64_t weight_plane_ = 0;  // floats of a plane of packed weights
};

ADM_RT_ENGINE_OP("conv3x3", Conv3x3);

}  // namespace
}  // namespace adm_rt::engine
