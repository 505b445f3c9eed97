// Adaptive steps of a batch with one call from Python between two network calls.
//
// A plan knows all buffers of a batch. Network outputs are held as they come, as references to the tensors, unless they
// are no plain tensors like the state or overlap what is in use: then the caller is told, and deals with it.
#pragma once

#include <pybind11/pybind11.h>

namespace fm_python {

void define_steps(pybind11::module_& m);

}  // namespace fm_python
