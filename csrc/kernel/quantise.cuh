// All launches before attention, in one image.
#pragma once
#include "classify_mask.cuh"
#include "quantise_keys.cuh"
#include "quantise_values.cuh"
