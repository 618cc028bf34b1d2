#pragma once
#include "block.h"

namespace sage {
inline int special_tid_x() { return threadIdx.x; }
inline int special_ctaid_x() { return blockIdx.x; }
inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
}  // namespace sage
