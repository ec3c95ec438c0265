// Element types of the tensors that the ops take. The numbers cross the Python binding as ints.
#pragma once

#include "common/check.h"

namespace adm_rt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "unknown";
}

inline DType dtype_from_int(int code) {
  ADM_RT_CHECK(code >= 0 && code <= 2, "dtype code ", code,
               " is not one of 0 (float32), 1 (bfloat16), 2 (float16)");
  return static_cast<DType>(code);
}

}  // namespace adm_rt
