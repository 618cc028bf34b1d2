// The types that P and V can have.
#pragma once
#include "../ptx/types.cuh"

namespace sage {

enum class Values { fp16, fp8, int8 };  // fp8: e4m3; int8: V signed, P unsigned

template <Values kValues>
constexpr int kValueBytes = kValues == Values::fp16 ? 2 : 1;

}  // namespace sage
