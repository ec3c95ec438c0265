// The launchers of ada_group_norm on CUDA, for C++ that does not include CUDA's headers.
//
// The formula is that of ada_group_norm.h. Beside it, in one call: a second input whose channels
// follow those of the first (the concatenation with a skip connection), and an average pooling or a
// nearest-neighbour enlargement by 2 of the result, as in ADM's residual blocks that resample.
#pragma once

#include <cstdint>

#include "ops/ada_group_norm.h"

namespace adm_rt {

// What becomes of the height x width pixels after the activation.
enum class Resample : int {
  kNone = 0,
  kAveragePool = 1,  // means of 2x2: height/2 x width/2, both even
  kNearestUp = 2,    // every pixel four times: 2 height x 2 width
};

// Sizes and options that forward and backward share.
struct AdaGroupNormCudaShape {
  int64_t batch = 0;
  int64_t channels = 0;       // of x and skip together
  int64_t skip_channels = 0;  // the last of them, which come from skip; 0: there is no skip
  int64_t height = 0;         // other numbers of dimensions: height * width pixels
  int64_t width = 0;
  int64_t groups = 0;
  float eps = 1e-5f;
  bool silu = true;
  DType dtype = DType::kFloat32;  // of x, skip, y, x_out and their gradients
  AdaGroupNormLayout layout = AdaGroupNormLayout::kChannelsLast;
  Resample resample = Resample::kNone;
  DType scale_shift_dtype = DType::kFloat32;
  int64_t scale_shift_stride = 0;  // elements between the rows of scale_shift
};

struct AdaGroupNormCudaParams {
  AdaGroupNormCudaShape shape;
  const void* x = nullptr;              // [batch, channels - skip_channels, height, width]
  const void* skip = nullptr;           // [batch, skip_channels, height, width], or null
  const float* weight = nullptr;        // [channels]
  const float* bias = nullptr;          // [channels]
  const void* scale_shift = nullptr;    // [batch, 2 * channels], scale first; null: no modulation
  const float* x_moments = nullptr;     // [batch, 2, channels of x]; null: computed here
  const float* skip_moments = nullptr;  // [batch, 2, skip_channels]; null: computed here
  void* y = nullptr;                    // [batch, channels, out height, out width]
  void* x_out = nullptr;  // like y: the inputs, joined and resampled; null: not wanted
  float* mean = nullptr;  // [batch, groups]; null: not wanted
  float* rstd = nullptr;  // [batch, groups]; null: not wanted
};

// Gradients as in ada_group_norm.h; those that are null are not computed. Without dweight, dbias
// and dscale_shift this is the input gradient alone.
struct AdaGroupNormCudaBackwardParams {
  AdaGroupNormCudaShape shape;
  const void* grad = nullptr;  // like y
  const void* grad_x_out =
      nullptr;  // like y: taken back through the resampling and added to dx; null
  const void* x = nullptr;
  const void* skip = nullptr;
  const float* mean = nullptr;  // [batch, groups], as the forward pass wrote it
  const float* rstd = nullptr;  // [batch, groups]
  const float* weight = nullptr;
  const float* bias = nullptr;
  const void* scale_shift = nullptr;
  void* dx = nullptr;             // like x
  void* dskip = nullptr;          // like skip; wanted or not together with dx
  float* dweight = nullptr;       // [channels]
  float* dbias = nullptr;         // [channels]
  float* dscale_shift = nullptr;  // [batch, 2 * channels], dense
};

// All of them enqueue their work on `stream` (a cudaStream_t) and return: no allocation and no
// synchronisation, so a graph can capture them. Pointers are device pointers on the current device;
// outputs overlap nothing. Moments are the mean (row 0) and the biased variance (row 1) of every
// channel over the pixels of an image, as its producer may have found them on the way.
//
// workspace: as many bytes as the function says, aligned to 16, on the device. Its contents need
// not be set and mean nothing afterwards.
//
// Results are the same bits in every run and do not depend on the other images of the batch.
// Channels-last tensors whose numbers of channels are multiples of 16 bytes and whose addresses are
// aligned to 16 take the fast kernels; everything else is correct and slower.
//
// They throw std::invalid_argument for bad params, std::runtime_error for what CUDA reports.
void ada_group_norm_cuda(const AdaGroupNormCudaParams& params, void* workspace, void* stream);
int64_t ada_group_norm_cuda_workspace(const AdaGroupNormCudaShape& shape);

void ada_group_norm_backward_cuda(const AdaGroupNormCudaBackwardParams& params, void* workspace,
                                  void* stream);
int64_t ada_group_norm_backward_cuda_workspace(const AdaGroupNormCudaShape& shape);

// Only the moments [batch, 2, channels] of x: of a tensor that is normalised more than once. Reads
// the batch, channels, height, width, dtype and layout of the shape; workspace as for the forward.
void channel_moments_cuda(const AdaGroupNormCudaShape& shape, const void* x, float* moments,
                          void* workspace, void* stream);

}  // namespace adm_rt
