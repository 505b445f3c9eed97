#include "plain_call.h"

#include <cmath>
#include <cstring>

#include "combine/combine.h"
#include "regression_loss/regression_loss.h"
#include "row_dots/row_dots.h"

namespace py = pybind11;

namespace fm_python {
namespace {

// Beyond this, outputs come from the pool and the time is the kernel's: Python does it.
constexpr int64_t most_elements = int64_t{1} << 20;

// What is looked up in Python once. Never released: it must outlive the interpreter's last tensor.
struct Torch {
  PyObject *tensor, *parameter, *dtypes[4], *int64, *empty_like, *empty, *affine, *noise;
  PyObject *dtype, *shape, *is_cpu, *requires_grad, *is_contiguous, *data_ptr, *coefficient, *shift, *slope, *seed,
      *stream, *row_offset;
  PyObject *scalar_shape, *dtype_name;

  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto keep = [](py::object value) { return value.release().ptr(); };
    tensor = keep(torch.attr("Tensor"));
    parameter = keep(torch.attr("nn").attr("Parameter"));
    const char* names[] = {"float32", "bfloat16", "float16", "float64"};  // in the order of fm::Dtype
    for (int i = 0; i < 4; ++i) dtypes[i] = keep(torch.attr(names[i]));
    int64 = keep(torch.attr("int64"));
    empty_like = keep(torch.attr("empty_like"));
    empty = keep(torch.attr("empty"));
    affine = keep(py::module_::import("fmkernels.ops._operands").attr("Affine"));
    noise = keep(py::module_::import("fmkernels.random").attr("Noise"));
    dtype = name("dtype");
    shape = name("shape");
    is_cpu = name("is_cpu");
    requires_grad = name("requires_grad");
    is_contiguous = name("is_contiguous");
    data_ptr = name("data_ptr");
    coefficient = name("tensor");
    shift = name("shift");
    slope = name("slope");
    seed = name("seed");
    stream = name("stream");
    row_offset = name("row_offset");
    scalar_shape = PyTuple_New(0);
    dtype_name = PyTuple_Pack(1, dtype);
  }
};

const Torch& torch() {
  static const Torch* instance = new Torch;
  return *instance;
}

// Any failure to read an attribute means that the tensor is not plain; Python's own path then says what is wrong.
bool is_true(PyObject* value) {
  const bool result = value == Py_True;
  if (value == nullptr) PyErr_Clear();
  Py_XDECREF(value);
  return result;
}

struct View {
  void* data;
  fm::Dtype dtype;
  py::object shape;  // a tuple
  int64_t elements;

  int64_t dim() const { return PyTuple_GET_SIZE(shape.ptr()); }
  int64_t size(int64_t i) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i)); }
};

bool is_tensor(PyObject* x) {
  return reinterpret_cast<PyObject*>(Py_TYPE(x)) == torch().tensor ||
         reinterpret_cast<PyObject*>(Py_TYPE(x)) == torch().parameter;
}

// A contiguous tensor on the CPU of exactly torch's own type. The caller has the tensor's reference.
bool view(PyObject* x, bool may_require_grad, View& out) {
  const Torch& t = torch();
  if (!is_tensor(x) || !is_true(PyObject_GetAttr(x, t.is_cpu))) return false;
  if (!may_require_grad && is_true(PyObject_GetAttr(x, t.requires_grad))) return false;
  if (!is_true(PyObject_CallMethodNoArgs(x, t.is_contiguous))) return false;
  const py::object dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, t.dtype));
  int code = 0;
  while (code < 4 && dtype.ptr() != t.dtypes[code]) ++code;
  if (code == 4) return false;
  out.dtype = static_cast<fm::Dtype>(code);
  out.shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, t.shape));
  if (!out.shape || !PyTuple_Check(out.shape.ptr())) return false;
  out.elements = 1;
  for (int64_t i = 0; i < out.dim(); ++i) out.elements *= out.size(i);
  const py::object address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(x, t.data_ptr));
  out.data = PyLong_AsVoidPtr(address.ptr());
  return out.elements > 0 && out.elements <= most_elements;
}

bool same_shape(const View& a, const View& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

bool number(PyObject* x, double& out) {
  if (!PyFloat_CheckExact(x)) return false;
  out = PyFloat_AS_DOUBLE(x);
  return std::isfinite(out);
}

// A number, a tensor of leading shape in the accumulation dtype, or an affine function of one. covered: elements that
// an entry covers.
bool coefficient(PyObject* x, const View& data, fm::Dtype accumulate, fm::Coefficient& out, int64_t& covered) {
  const Torch& t = torch();
  out = {nullptr, 1, 0, 0.0};
  covered = data.elements;
  if (number(x, out.value)) return true;
  py::object holder;
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) == t.affine) {
    const py::object shift = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, t.shift));
    const py::object slope = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, t.slope));
    holder = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, t.coefficient));
    if (!number(shift.ptr(), out.value) || !number(slope.ptr(), out.slope)) return false;
    x = holder.ptr();
  }
  View entries;
  if (!view(x, false, entries) || entries.dtype != accumulate || entries.dim() > data.dim()) return false;
  for (int64_t i = 0; i < entries.dim(); ++i)
    if (entries.size(i) != data.size(i)) return false;
  out.data = entries.data;
  out.stride = entries.dim() == 0 ? 0 : 1;
  covered = data.elements / entries.elements;
  return true;
}

void* address_of(const py::object& tensor) {
  return PyLong_AsVoidPtr(
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), torch().data_ptr)).ptr());
}

bool integer(PyObject* owner, PyObject* attribute, int64_t& out) {
  const py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(owner, attribute));
  out = PyLong_AsLongLong(value.ptr());
  if (out == -1 && PyErr_Occurred() != nullptr) PyErr_Clear();  // beyond int64: Python says so
  return out >= 0;
}

// fm.Noise with its seed on the CPU; the constructor has checked its fields.
bool noise(PyObject* x, const View& data, fm::Operand& out) {
  const Torch& t = torch();
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != t.noise) return false;
  const py::object seed = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, t.seed));
  int64_t row_offset = 0;
  if (!is_tensor(seed.ptr()) || !is_true(PyObject_GetAttr(seed.ptr(), t.is_cpu)) || !integer(x, t.stream, out.stream) ||
      !integer(x, t.row_offset, row_offset) || row_offset > most_elements * most_elements)
    return false;
  out.offset = row_offset * (data.dim() == 0 ? 1 : data.elements / data.size(0));
  out.seed = static_cast<const int64_t*>(address_of(seed));
  return true;
}

// Operands of data's shape, or noise, all of one dtype, and their coefficients. With `trusted` an int is the address of
// such an operand.
template <bool trusted = false>
bool fill(py::handle operands, py::handle coefficients, const View& data, fm::Dtype dtype, fm::Dtype accumulate,
          int limit, fm::Operand* out, int& count, int64_t& inner) {
  if (!PyList_CheckExact(operands.ptr()) || !PyList_CheckExact(coefficients.ptr())) return false;
  const Py_ssize_t n = PyList_GET_SIZE(operands.ptr());
  if (n < 1 || n > limit || PyList_GET_SIZE(coefficients.ptr()) != n) return false;
  int64_t covered[fm::max_operands];
  inner = data.elements;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PyList_GET_ITEM(operands.ptr(), i);
    if (trusted && PyLong_CheckExact(item)) {
      out[i].data = PyLong_AsVoidPtr(item);
    } else if (!noise(item, data, out[i])) {
      View operand;
      if (!view(item, false, operand) || operand.dtype != dtype || !same_shape(operand, data)) return false;
      out[i].data = operand.data;
    }
    if (!coefficient(PyList_GET_ITEM(coefficients.ptr(), i), data, accumulate, out[i].coefficient, covered[i]))
      return false;
    inner = covered[i] < inner ? covered[i] : inner;
  }
  for (Py_ssize_t i = 0; i < n; ++i) out[i].coefficient.rows_per_entry = covered[i] / inner;
  count = static_cast<int>(n);
  return true;
}

py::object call(PyObject* function, PyObject* argument) {
  return py::reinterpret_steal<py::object>(PyObject_CallOneArg(function, argument));
}

py::object empty(PyObject* shape, fm::Dtype dtype) {
  PyObject* arguments[] = {shape, torch().dtypes[static_cast<int>(dtype)]};
  return py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch().empty, arguments, 1, torch().dtype_name));
}

bool is_sequence(PyObject* x) { return PyList_CheckExact(x) || PyTuple_CheckExact(x); }

// An index of one of `count` tensors, or -1.
bool index(PyObject* x, int count, int& out) {
  if (!PyLong_CheckExact(x)) return false;
  int overflow = 0;
  const long value = PyLong_AsLongAndOverflow(x, &overflow);
  out = static_cast<int>(value);
  return overflow == 0 && value >= -1 && value < count;
}

}  // namespace

py::object combine_plain(py::handle operands, py::handle coefficients, bool store_noise) {
  if (!PyList_CheckExact(operands.ptr()) || PyList_GET_SIZE(operands.ptr()) == 0) return py::none();
  PyObject* first = PyList_GET_ITEM(operands.ptr(), 0);
  View data;
  fm::CombineArguments a{};
  if (!view(first, false, data)) return py::none();
  const fm::Dtype accumulate = data.dtype == fm::Dtype::f64 ? fm::Dtype::f64 : fm::Dtype::f32;
  if (!fill(operands, coefficients, data, data.dtype, accumulate, fm::max_operands - 1, a.operands, a.count, a.inner))
    return py::none();
  py::object out = call(torch().empty_like, first);
  if (!out) throw py::error_already_set();
  py::list results;
  results.append(out);
  for (int i = 0; store_noise && i < a.count; ++i) {
    if (a.operands[i].data != nullptr) continue;
    const py::object stored = call(torch().empty_like, first);
    if (!stored) throw py::error_already_set();
    a.operands[i].store = address_of(stored);
    results.append(stored);
  }
  a.dtype = data.dtype;
  a.out = address_of(out);
  a.rows = data.elements / a.inner;
  a.samples = 1;
  return fm::combine_cpu(a) == fm::Status::ok ? py::object(results) : py::none();
}

bool combine_into_buffer(uintptr_t out, int dtype, py::tuple shape, py::handle operands, py::handle coefficients,
                         uintptr_t copy) {
  View data;
  fm::CombineArguments a{};
  data.data = reinterpret_cast<void*>(out);
  data.dtype = static_cast<fm::Dtype>(dtype);
  data.elements = 1;
  data.shape = std::move(shape);
  for (int64_t i = 0; i < data.dim(); ++i) data.elements *= data.size(i);
  const fm::Dtype accumulate = data.dtype == fm::Dtype::f64 ? fm::Dtype::f64 : fm::Dtype::f32;
  if (!fill<true>(operands, coefficients, data, data.dtype, accumulate, fm::max_operands - 1, a.operands, a.count,
                  a.inner))
    return false;
  a.dtype = data.dtype;
  a.out = data.data;
  a.rows = data.elements / a.inner;
  a.samples = 1;
  if (fm::combine_cpu(a) != fm::Status::ok) return false;
  if (copy != 0)
    std::memcpy(reinterpret_cast<void*>(copy), a.out, static_cast<size_t>(data.elements * fm::bytes_of(data.dtype)));
  return true;
}

py::object regression_loss_plain(py::handle pred, py::handle operands, py::handle coefficients, int kind, double delta,
                                 bool mean, bool need_grad) {
  View data, target;
  fm::RegressionLossArguments a{};
  if (!PyList_CheckExact(operands.ptr()) || PyList_GET_SIZE(operands.ptr()) == 0) return py::none();
  if (!view(pred.ptr(), true, data) || !view(PyList_GET_ITEM(operands.ptr(), 0), false, target)) return py::none();
  // float16's gradient waits for its scale, which is Python's business.
  if (data.dtype == fm::Dtype::f16 || (data.dtype == fm::Dtype::f64) != (target.dtype == fm::Dtype::f64))
    return py::none();
  const fm::Dtype accumulate = data.dtype == fm::Dtype::f64 ? fm::Dtype::f64 : fm::Dtype::f32;
  if (!fill(operands, coefficients, data, target.dtype, accumulate, fm::max_loss_operands, a.operands, a.count,
            a.inner))
    return py::none();
  const Torch& t = torch();
  py::object grad = need_grad ? call(t.empty_like, pred.ptr()) : py::none();
  py::object loss = empty(t.scalar_shape, accumulate);
  if (!grad || !loss) throw py::error_already_set();
  a.pred_dtype = data.dtype;
  a.pred = data.data;
  a.grad = need_grad ? address_of(grad) : nullptr;
  a.dtype = target.dtype;
  a.rows = data.elements / a.inner;
  a.weight = {nullptr, 1, 0, 1.0};
  a.scale = {nullptr, 1, 0, mean ? 1.0 / static_cast<double>(data.elements) : 1.0};
  a.scale_grad = true;
  a.kind = static_cast<fm::Penalty>(kind);
  a.delta = delta;
  a.loss = address_of(loss);
  a.groups = 1;
  if (fm::regression_loss_cpu(a) != fm::Status::ok) return py::none();
  return py::make_tuple(loss, grad);
}

py::object row_dots_plain(py::handle tensors, py::handle pairs) {
  if (!is_sequence(tensors.ptr()) || !is_sequence(pairs.ptr())) return py::none();
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
    else if (operand.dtype != data.dtype || !same_shape(operand, data))
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
  const py::tuple shape = py::make_tuple(a.rows, a.pairs);
  py::object out = empty(shape.ptr(), data.dtype == fm::Dtype::f64 ? fm::Dtype::f64 : fm::Dtype::f32);
  if (!out) throw py::error_already_set();
  a.out = address_of(out);
  return fm::row_dots_cpu(a) == fm::Status::ok ? out : py::none();
}

}  // namespace fm_python
