// The operations on ordinary tensors, with checks and marshalling in C++.
//
// At a few hundred elements, or on a GPU, a call costs what Python does around it. The <op>_plain functions take the
// tensors themselves, read their attributes through Python, and run the kernel if everything is as plain as in most
// training loops; otherwise they return None, and the Python functions check, explain and run. They accept nothing that
// those would reject.
#pragma once

#include "common/operand.h"
#include "tensors.h"

namespace fm_python {

// A flag: exactly True or False.
bool flag(py::handle x, bool& out);

// What noise and coefficients are accumulated in.
inline fm::Dtype accumulation(fm::Dtype dtype) { return dtype == fm::Dtype::f64 ? fm::Dtype::f64 : fm::Dtype::f32; }

// The address of a seed, an int64 tensor, and its device; null where it is none.
const int64_t* seed_of(PyObject* x, int& device);

// Operands (a list) of data's shape, or noise, all of the first one's dtype, and their coefficients (a list): numbers,
// tensors whose shape is a leading part of data's, or affine functions of one. `first`: the first operand, which is a
// tensor. `inner`: elements over which all coefficients are one number.
bool fill(py::handle operands, py::handle coefficients, const View& data, const View& first, int limit,
          fm::Operand* out, int& count, int64_t& inner);

// One more coefficient beside those of `fill`, of which it may have more entries.
bool fill_beside(py::handle coefficient, const View& data, fm::Operand* operands, int count, fm::Coefficient& out,
                 int64_t& inner);

// `fill` for data that is known; an int is the address of an operand like it.
bool fill_trusted(py::handle operands, py::handle coefficients, const View& data, int limit, fm::Operand* out,
                  int& count, int64_t& inner);

}  // namespace fm_python
