// The operations on small, ordinary CPU tensors, with checks and marshalling in C++.
//
// At a few hundred elements a call costs what Python does around it. These functions take the tensors themselves, read
// their attributes through Python, and run the kernel if everything is as plain as in most training loops; otherwise
// they return None, and the Python functions check, explain and run. They accept nothing that those would reject.
#pragma once

#include <pybind11/pybind11.h>

namespace fm_python {

// combine(operands, coefficients): [the new tensor, *noise drawn (if stored)], or None.
pybind11::object combine_plain(pybind11::handle operands, pybind11::handle coefficients, bool store_noise);

// combine into a contiguous CPU tensor with elements, by its address, dtype code and shape: whether it was done. An
// operand that is an int is the address of another such tensor; the others are checked. None may overlap the output.
// With `copy`, an address, the result is written there too.
bool combine_into_buffer(uintptr_t out, int dtype, pybind11::tuple shape, pybind11::handle operands,
                         pybind11::handle coefficients, uintptr_t copy);

// regression_loss(pred, operands, coefficients, kind, delta, scale_value, need_grad) with one scale: (loss, gradient or
// None), or None.
pybind11::object regression_loss_plain(pybind11::handle pred, pybind11::handle operands, pybind11::handle coefficients,
                                       int kind, double delta, bool mean, bool need_grad);

// row_dots(tensors, pairs): the new tensor, or None.
pybind11::object row_dots_plain(pybind11::handle tensors, pybind11::handle pairs);

}  // namespace fm_python
