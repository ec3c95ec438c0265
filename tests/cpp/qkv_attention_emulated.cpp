// The CUDA kernels of qkv_attention and their launchers under the emulator. C interface for ctypes;
// the arguments are those of python/bind_cuda_qkv_attention.cpp. Returns 0, or 1 with a message in
// error_text().
#define ADM_RT_EMULATOR
#include <cstdint>
#include <exception>
#include <string>

#include "ops/qkv_attention_backward_cuda.cu"
#include "ops/qkv_attention_cuda.cu"

namespace {

using namespace adm_rt;

std::string error;

// sizes: batch, heads, head_dim, length, num_queries, order, dtype.
QkvAttentionShape shape_of(const int64_t* sizes) {
  QkvAttentionShape shape;
  shape.batch = sizes[0], shape.heads = sizes[1], shape.head_dim = sizes[2];
  shape.length = sizes[3], shape.num_queries = sizes[4];
  shape.order = static_cast<QkvOrder>(sizes[5]);
  shape.dtype = dtype_from_int(static_cast<int>(sizes[6]));
  return shape;
}

template <class Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* error_text() { return error.c_str(); }

void set_device(int schedule, unsigned multiprocessors) {
  simt::Emulator::get().schedule = static_cast<simt::Schedule>(schedule);
  simt::Emulator::get().multiprocessors = multiprocessors;
}

int run_forward(uintptr_t qkv, uintptr_t out, uintptr_t stats, const int64_t* sizes, int layout) {
  return guarded([&] {
    QkvAttentionParams params;
    params.shape = shape_of(sizes);
    params.qkv = reinterpret_cast<const void*>(qkv);
    params.out = reinterpret_cast<void*>(out);
    params.stats = reinterpret_cast<float*>(stats);
    qkv_attention_cuda(params, static_cast<QkvLayout>(layout), nullptr);
  });
}

int run_backward(uintptr_t grad, uintptr_t qkv, uintptr_t out, uintptr_t stats, uintptr_t dqkv,
                 uintptr_t workspace, const int64_t* sizes, int layout) {
  return guarded([&] {
    QkvAttentionBackwardParams params;
    params.shape = shape_of(sizes);
    params.grad = reinterpret_cast<const void*>(grad);
    params.qkv = reinterpret_cast<const void*>(qkv);
    params.out = reinterpret_cast<const void*>(out);
    params.stats = reinterpret_cast<const float*>(stats);
    params.dqkv = reinterpret_cast<void*>(dqkv);
    qkv_attention_backward_cuda(params, static_cast<QkvLayout>(layout),
                                reinterpret_cast<void*>(workspace), nullptr);
  });
}

int64_t workspace_bytes(const int64_t* sizes) {
  return qkv_attention_backward_workspace(shape_of(sizes));
}

}  // extern "C"
