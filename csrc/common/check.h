// ADM_RT_CHECK(condition, message pieces...): argument checks of the core. A failure throws
// std::invalid_argument, which pybind11 turns into a Python ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace adm_rt {

template <typename... Pieces>
[[noreturn]] void throw_invalid_argument(const Pieces&... pieces) {
  std::ostringstream message;
  (message << ... << pieces);
  throw std::invalid_argument(message.str());
}

}  // namespace adm_rt

#define ADM_RT_CHECK(condition, ...)                 \
  do {                                               \
    if (!(condition)) {                              \
      ::adm_rt::throw_invalid_argument(__VA_ARGS__); \
    }                                                \
  } while (false)
