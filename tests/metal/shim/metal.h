// Everything a captured kernel needs, and last the words of Metal that C++ does not have.
#pragma once
#include "math.h"
#include "program.h"
#include "simd.h"

using namespace metal;

// Address spaces are not told apart. Declarations of threadgroup arrays were rewritten before
// (see msl.py), what is left of the word qualifies pointers.
#define SHIM_THREADGROUP(type, name, extent) \
  auto& name = shim::threadgroup_array<type extent>(__COUNTER__)
#define device
#define constant
#define threadgroup
#define thread
