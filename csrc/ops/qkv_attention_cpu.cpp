// qkv_attention on the CPU: argument checks, threads, choice of the instruction set.
#include <cstdlib>
#include <memory>
#include <new>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "ops/qkv_attention_kernels.h"

namespace adm_rt {
namespace {

// At least this many query blocks of one head go to a thread at once: it transposes k for them.
constexpr int64_t kBlocksPerTask = 4;

void check_shape(const QkvAttentionShape& s) {
  ADM_RT_CHECK(s.batch >= 0 && s.heads >= 1 && s.head_dim >= 1 && s.length >= 1,
               "qkv_attention: batch=", s.batch, ", heads=", s.heads, ", head_dim=", s.head_dim,
               ", length=", s.length, " must be positive (batch may be 0)");
  ADM_RT_CHECK(s.num_queries >= 1 && s.num_queries <= s.length,
               "qkv_attention: num_queries=", s.num_queries, " is not in [1, length=", s.length,
               "]");
  ADM_RT_CHECK(s.order == QkvOrder::kLegacy || s.order == QkvOrder::kNew,
               "qkv_attention: order=", static_cast<int>(s.order), " is not 0 (legacy) or 1 (new)");
  ADM_RT_CHECK(s.dtype == DType::kFloat32 || s.dtype == DType::kBFloat16, "qkv_attention: dtype ",
               name_of(s.dtype), " is not float32 or bfloat16");
}

// 64-byte aligned floats that this thread keeps from call to call, up to kKept of them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats > kept_.size) {
      kept_.data.reset();
      kept_.size = 0;
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
      kept_.data.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (kept_.data == nullptr) throw std::bad_alloc();
      kept_.size = floats;
    }
  }
  ~Scratch() {
    if (kept_.size > kKept) {
      kept_.data.reset();
      kept_.size = 0;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return kept_.data.get(); }

 private:
  static constexpr int64_t kKept = int64_t{4} << 20;  // 16 MiB
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t size = 0;
  };
  static thread_local Buffer kept_;
};

thread_local Scratch::Buffer Scratch::kept_;

}  // namespace

void qkv_attention_cpu(const QkvAttentionParams& p) {
  const QkvAttentionShape& shape = p.shape;
  check_shape(shape);
  const int64_t heads = shape.batch * shape.heads;
  if (heads == 0) return;
  ADM_RT_CHECK(p.qkv != nullptr && p.out != nullptr, "qkv_attention: null pointer");
  const int64_t floats = ADM_RT_DISPATCH(qkv_attention_scratch(shape));
  if (shape.num_queries == 1) {
    parallel_for(heads, 8, [&](int64_t begin, int64_t end) {
      const Scratch scratch(floats);
      ADM_RT_DISPATCH(qkv_attention_single(p, scratch.data(), begin, end));
    });
    return;
  }
  const int64_t block = ADM_RT_DISPATCH(qkv_attention_query_block());
  const int64_t blocks = (shape.num_queries + block - 1) / block;
  const int64_t grain = blocks < kBlocksPerTask ? blocks : kBlocksPerTask;
  parallel_for(heads * blocks, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(floats);
    ADM_RT_DISPATCH(qkv_attention_tasks(p, scratch.data(), begin, end));
  });
}

void qkv_attention_backward_cpu(const QkvAttentionBackwardParams& p) {
  const QkvAttentionShape& shape = p.shape;
  check_shape(shape);
  const int64_t heads = shape.batch * shape.heads;
  if (heads == 0) return;
  ADM_RT_CHECK(p.grad != nullptr && p.qkv != nullptr && p.out != nullptr && p.stats != nullptr &&
                   p.dqkv != nullptr,
               "qkv_attention_backward: null pointer");
  const int64_t floats = ADM_RT_DISPATCH(qkv_attention_backward_scratch(shape));
  const bool single = shape.num_queries == 1;
  parallel_for(heads, single ? 8 : 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(floats);
    if (single) {
      ADM_RT_DISPATCH(qkv_attention_backward_single(p, scratch.data(), begin, end));
    } else {
      ADM_RT_DISPATCH(qkv_attention_backward_tasks(p, scratch.data(), begin, end));
    }
  });
}

}  // namespace adm_rt
