#include "row_dots/row_dots.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "binding.h"
#include "common/workspace.h"
#include "device.h"
#include "plain.h"

namespace fm_python {
namespace {

void row_dots(int device, int dtype, int64_t rows, int64_t inner, const std::vector<Address>& tensors,
              const std::vector<int>& first, const std::vector<int>& second, Address out, Address workspace,
              Address stream) {
  if (tensors.size() > fm::max_dot_tensors || first.size() > fm::max_dot_pairs || second.size() != first.size())
    check(fm::Status::bad_argument);
  fm::RowDotsArguments a{};
  a.dtype = static_cast<fm::Dtype>(dtype);
  a.rows = rows;
  a.inner = inner;
  a.count = static_cast<int>(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) a.tensors[i] = pointer(tensors[i]);
  a.pairs = static_cast<int>(first.size());
  std::copy(first.begin(), first.end(), a.first);
  std::copy(second.begin(), second.end(), a.second);
  a.out = pointer(out);
  a.workspace = pointer(workspace);
  run_unlocked([&] { return device == cpu ? fm::row_dots_cpu(a) : fm::row_dots_cuda(a, pointer(stream)); });
}

bool is_sequence(py::handle x) { return PyList_CheckExact(x.ptr()) || PyTuple_CheckExact(x.ptr()); }

// An index of one of `count` tensors, or -1.
bool index(PyObject* x, int count, int& out) {
  if (!PyLong_CheckExact(x)) return false;
  int overflow = 0;
  const long value = PyLong_AsLongAndOverflow(x, &overflow);
  out = static_cast<int>(value);
  return overflow == 0 && value >= -1 && value < count;
}

// row_dots(tensors, pairs): the new tensor, or None.
py::object row_dots_plain(py::handle tensors, py::handle pairs) {
  if (!is_sequence(tensors) || !is_sequence(pairs)) return py::none();
  fm::RowDotsArguments a{};
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(tensors.ptr());
  const Py_ssize_t pair_count = PySequence_Fast_GET_SIZE(pairs.ptr());
  if (count < 1 || count > fm::max_dot_tensors || pair_count < 1 || pair_count > fm::max_dot_pairs) return py::none();
  View data;
  for (Py_ssize_t i = 0; i < count; ++i) {
    View operand;
    if (!view(PySequence_Fast_GET_ITEM(tensors.ptr(), i), false, operand)) return py::none();
    a.tensors[i] = operand.data;
    if (i == 0)
      data = std::move(operand);
    else if (operand.dtype != data.dtype || operand.device != data.device || !same_shape(operand, data))
      return py::none();
  }
  if (data.dim() == 0) return py::none();
  a.count = static_cast<int>(count);
  a.pairs = static_cast<int>(pair_count);
  for (int p = 0; p < a.pairs; ++p) {
    PyObject* pair = PySequence_Fast_GET_ITEM(pairs.ptr(), p);
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2 ||
        !index(PyTuple_GET_ITEM(pair, 0), a.count, a.first[p]) ||
        !index(PyTuple_GET_ITEM(pair, 1), a.count, a.second[p]))
      return py::none();
  }
  a.dtype = data.dtype;
  a.rows = data.size(0);
  a.inner = data.elements / a.rows;
  Place place;
  if (!place_of(data.device, place)) return py::none();
  PyObject* first = PySequence_Fast_GET_ITEM(tensors.ptr(), 0);
  const py::object out = empty_beside(first, py::make_tuple(a.rows, a.pairs).ptr(), accumulation(data.dtype));
  if (!out) throw py::error_already_set();
  const Scratch scratch(first, data.device, a.pairs * fm::workspace_elements_cuda(data.elements, a.rows));
  a.out = new_address(out.ptr());
  a.workspace = scratch.data();
  const bool done =
      a.out != nullptr && !scratch.failed() && place.run(a, fm::row_dots_cpu, fm::row_dots_cuda) == fm::Status::ok;
  return done ? out : py::none();
}

FM_BINDING(row_dots) {
  m.def("row_dots", &row_dots);
  m.def("row_dots_plain", &row_dots_plain);
}

}  // namespace
}  // namespace fm_python
