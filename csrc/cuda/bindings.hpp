// What bindings.cpp calls in the other files of bindings.
#pragma once

#include <pybind11/pybind11.h>

namespace hwprune {

// Adds the launches of masked_conv.cuh.
void bind_masked_conv(pybind11::module_& module);

// Adds the launches of ratio_update.cuh.
void bind_ratio_update(pybind11::module_& module);

}  // namespace hwprune
