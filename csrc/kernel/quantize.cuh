// All launches before attention, in one image.
#pragma once
#include "classify_mask.cuh"
#include "place_sequences.cuh"
#include "quantize_k.cuh"
#include "quantize_v.cuh"
