// Launches run one after another, and so do their CTAs.
#pragma once
#include "block.h"

namespace sage {
constexpr bool kProgrammaticLaunch = ARCH >= 90;
inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}

inline void store_release(i32* to, i32 x) { *to = x; }
inline i32 load_acquire(const i32* from) { return *from; }
}  // namespace sage
