// Both quantising launches, in one image.
#pragma once
#include "quantize_k.cuh"
#include "quantize_v.cuh"
