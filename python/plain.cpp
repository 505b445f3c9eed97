#include "plain.h"

#include <cmath>

namespace fm_python {
namespace {

// fmkernels' own classes and their fields, looked up once and never released.
struct Classes {
  PyObject *affine, *noise;
  PyObject *coefficient, *shift, *slope, *seed, *stream, *row_offset, *dtype, *int64;

  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

  Classes() {
    affine = py::module_::import("fmkernels.ops._operands").attr("Affine").cast<py::object>().release().ptr();
    noise = py::module_::import("fmkernels.random").attr("Noise").cast<py::object>().release().ptr();
    int64 = py::module_::import("torch").attr("int64").cast<py::object>().release().ptr();
    coefficient = name("tensor");
    shift = name("shift");
    slope = name("slope");
    seed = name("seed");
    stream = name("stream");
    row_offset = name("row_offset");
    dtype = name("dtype");
  }
};

const Classes& classes() {
  static const Classes* instance = new Classes;
  return *instance;
}

bool is_a(PyObject* x, PyObject* type) { return reinterpret_cast<PyObject*>(Py_TYPE(x)) == type; }

bool number(PyObject* x, double& out) {
  if (x == nullptr || !PyFloat_CheckExact(x)) return false;
  out = PyFloat_AS_DOUBLE(x);
  return std::isfinite(out);
}

// covered: elements that an entry covers. Entries are contiguous, and so 1 apart.
bool coefficient(PyObject* x, const View& data, fm::Coefficient& out, int64_t& covered) {
  const Classes& c = classes();
  out = {nullptr, 1, 0, 0.0};
  covered = data.elements;
  if (number(x, out.value)) return true;
  py::object holder;
  if (is_a(x, c.affine)) {
    if (!number(attribute(x, c.shift).ptr(), out.value) || !number(attribute(x, c.slope).ptr(), out.slope))
      return false;
    holder = attribute(x, c.coefficient);
    x = holder.ptr();
  }
  View entries;
  if (x == nullptr || !view(x, false, entries) || entries.device != data.device || entries.dim() > data.dim())
    return false;
  for (int64_t i = 0; i < entries.dim(); ++i)
    if (entries.size(i) != data.size(i)) return false;
  out.data = entries.data;
  out.stride = entries.dim() == 0 ? 0 : 1;
  covered = data.elements / entries.elements;
  return entries.dtype == accumulation(data.dtype);
}

// An int from 0 to `most`.
bool integer(PyObject* owner, PyObject* name, int64_t most, int64_t& out) {
  const py::object value = attribute(owner, name);
  if (!value || !PyLong_CheckExact(value.ptr())) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  return overflow == 0 && out >= 0 && out <= most;
}

constexpr int64_t most_stream_elements = int64_t{1} << 62;  // as fmkernels.random has it
constexpr int64_t most_rows_before = int64_t{1} << 40;

// fm.Noise with its seed beside the data.
bool noise(PyObject* x, const View& data, fm::Operand& out) {
  const Classes& c = classes();
  int64_t row_offset = 0;
  int device = host;
  const py::object seed = attribute(x, c.seed);
  out.seed = seed_of(seed.ptr(), device);
  if (out.seed == nullptr || device != data.device || !integer(x, c.stream, INT64_MAX, out.stream) ||
      !integer(x, c.row_offset, most_rows_before, row_offset))
    return false;
  const int64_t row = data.dim() == 0 ? 1 : data.elements / data.size(0);
  if (row_offset > (most_stream_elements - data.elements) / row) return false;
  out.offset = row_offset * row;
  return true;
}

// `first`: the first operand where it was looked at already.
bool fill(py::handle operands, py::handle coefficients, const View& data, const View* first, fm::Dtype dtype, int limit,
          fm::Operand* out, int& count, int64_t& inner) {
  if (!PyList_CheckExact(operands.ptr()) || !PyList_CheckExact(coefficients.ptr())) return false;
  const Py_ssize_t n = PyList_GET_SIZE(operands.ptr());
  if (n < 1 || n > limit || PyList_GET_SIZE(coefficients.ptr()) != n) return false;
  int64_t covered[fm::max_operands];
  inner = data.elements;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PyList_GET_ITEM(operands.ptr(), i);
    if (first != nullptr && i == 0) {
      out[i].data = first->data;
    } else if (first == nullptr && PyLong_CheckExact(item)) {
      out[i].data = PyLong_AsVoidPtr(item);
    } else if (is_a(item, classes().noise)) {
      if (!noise(item, data, out[i])) return false;
    } else {
      View operand;
      if (!view(item, false, operand) || operand.dtype != dtype || operand.device != data.device ||
          !same_shape(operand, data))
        return false;
      out[i].data = operand.data;
    }
    if (!coefficient(PyList_GET_ITEM(coefficients.ptr(), i), data, out[i].coefficient, covered[i])) return false;
    inner = covered[i] < inner ? covered[i] : inner;
  }
  for (Py_ssize_t i = 0; i < n; ++i) out[i].coefficient.rows_per_entry = covered[i] / inner;
  count = static_cast<int>(n);
  return true;
}

}  // namespace

const int64_t* seed_of(PyObject* x, int& device) {
  if (x == nullptr || !is_tensor(x) || !device_of(x, device) || attribute(x, classes().dtype).ptr() != classes().int64)
    return nullptr;
  return static_cast<const int64_t*>(values_address(x));
}

bool flag(py::handle x, bool& out) {
  out = x.ptr() == Py_True;
  return out || x.ptr() == Py_False;
}

bool fill(py::handle operands, py::handle coefficients, const View& data, const View& first, int limit,
          fm::Operand* out, int& count, int64_t& inner) {
  return (&first == &data || (first.device == data.device && same_shape(first, data))) &&
         fill(operands, coefficients, data, &first, first.dtype, limit, out, count, inner);
}

bool fill_beside(py::handle value, const View& data, fm::Operand* operands, int count, fm::Coefficient& out,
                 int64_t& inner) {
  int64_t covered = 0;
  if (!coefficient(value.ptr(), data, out, covered)) return false;
  if (covered < inner) {
    for (int i = 0; i < count; ++i) operands[i].coefficient.rows_per_entry *= inner / covered;
    inner = covered;
  }
  out.rows_per_entry = covered / inner;
  return true;
}

bool fill_trusted(py::handle operands, py::handle coefficients, const View& data, int limit, fm::Operand* out,
                  int& count, int64_t& inner) {
  return fill(operands, coefficients, data, nullptr, data.dtype, limit, out, count, inner);
}

}  // namespace fm_python
