// Both quantising launches, in one image.
#pragma once
#include "quantise_keys.cuh"
#include "quantise_values.cuh"
