// What the emulator keeps of a grid, a thread, a warp and a barrier.
#pragma once

#include <cstdint>
#include <cstring>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "simt/emulator_shared.h"

namespace adm_rt::simt {

// The order in which blocks, warps and lanes run. Forward and reverse let one warp run as far ahead
// of the others as barriers allow; shuffled changes the order at every step.
enum class Schedule : int { kForward = 0, kReverse = 1, kShuffled = 2 };

namespace emulator {

// A line of device code.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  friend std::ostream& operator<<(std::ostream& out, const Site& site) {
    const char* slash = std::strrchr(site.file, '/');
    return out << (slash != nullptr ? slash + 1 : site.file) << ":" << site.line;
  }
};

struct Grid {
  unsigned blocks_x = 1, blocks_y = 1, blocks_z = 1, threads = 1;
  size_t shared_bytes = 0;
};

// What a lane brings to a warp collective and takes from it.
struct Exchange {
  uint32_t in[10];
  const void* address;
  uint32_t out[4];
};

enum class State { kReady, kWaiting, kDone };
struct __attribute__((visibility("hidden"))) Thread {
  Fiber fiber;
  State state = State::kDone;
  const char* waits_for = "";
  Site site = {"", 0};
  AsyncCopies copies;
};
struct Warp {
  unsigned arrived = 0, left = 0, generation = 0, first = 0;
  const char* name = "";
  Site site = {"", 0};
  Exchange lanes[2][kWarpSize];
};
struct Barrier {
  std::vector<unsigned> waiting;
  unsigned count = 0;
  Site site = {"", 0};
};

// Throws std::logic_error when no GPU of the supported ones could launch it.
inline void check_grid(const Grid& shape, size_t max_shared_bytes) {
  const auto refuse = [](const char* what, size_t value, size_t limit) {
    std::ostringstream text;
    text << "emulator: launch with " << what << " " << value << "; allowed: 1 to " << limit;
    throw std::logic_error(text.str());
  };
  if (shape.threads < 1 || shape.threads > 1024) refuse("threads", shape.threads, 1024);
  if (shape.blocks_x < 1 || shape.blocks_x > 0x7fffffffu) {
    refuse("blocks_x", shape.blocks_x, 0x7fffffff);
  }
  if (shape.blocks_y < 1 || shape.blocks_y > 65535) refuse("blocks_y", shape.blocks_y, 65535);
  if (shape.blocks_z < 1 || shape.blocks_z > 65535) refuse("blocks_z", shape.blocks_z, 65535);
  if (shape.shared_bytes > max_shared_bytes) {
    refuse("shared_bytes", shape.shared_bytes, max_shared_bytes);
  }
}

}  // namespace emulator
}  // namespace adm_rt::simt
