#include "tensors.h"

namespace fm_python {
namespace {

// What is looked up in Python once, attributes and methods as their descriptors: looking them up costs as much as some
// of them do. Never released: it must outlive the interpreter's last tensor.
struct Torch {
  PyObject *tensor, *parameter, *dtypes[4], *empty_like, *empty, *empty_names;
  PyObject *dtype, *shape, *is_cpu, *is_cuda, *requires_grad, *device;  // attributes
  PyObject *is_contiguous, *is_neg, *data_ptr, *stride, *get_device;    // methods

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto keep = [](py::object value) { return value.release().ptr(); };
    const py::object type = torch.attr("Tensor");
    const auto of_tensor = [&](const char* name) { return keep(type.attr(name)); };
    parameter = keep(torch.attr("nn").attr("Parameter"));
    const char* names[] = {"float32", "bfloat16", "float16", "float64"};  // in the order of fm::Dtype
    for (int i = 0; i < 4; ++i) dtypes[i] = keep(torch.attr(names[i]));
    empty_like = keep(torch.attr("empty_like"));
    empty = keep(torch.attr("empty"));
    empty_names = keep(py::make_tuple("dtype", "device"));
    dtype = of_tensor("dtype");
    shape = of_tensor("shape");
    is_cpu = of_tensor("is_cpu");
    is_cuda = of_tensor("is_cuda");
    requires_grad = of_tensor("requires_grad");
    device = of_tensor("device");
    is_contiguous = of_tensor("is_contiguous");
    is_neg = of_tensor("is_neg");
    data_ptr = of_tensor("data_ptr");
    stride = of_tensor("stride");
    get_device = of_tensor("get_device");
    tensor = keep(type);
  }
};

const Torch& torch() {
  static const Torch* instance = new Torch;
  return *instance;
}

py::object taken(PyObject* value) {
  if (value == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(value);
}

// An attribute, or a method's answer: new references, or null with an exception set.
PyObject* read(PyObject* x, PyObject* descriptor) {
  return Py_TYPE(descriptor)->tp_descr_get(descriptor, x, reinterpret_cast<PyObject*>(Py_TYPE(x)));
}
PyObject* ask(PyObject* x, PyObject* method) { return PyObject_Vectorcall(method, &x, 1, nullptr); }

// Both take the reference to `value`, which may be null with an exception set.
bool is(PyObject* value, PyObject* expected) {
  const bool result = value == expected;
  if (value == nullptr) PyErr_Clear();
  Py_XDECREF(value);
  return result;
}

bool equal(PyObject* value, PyObject* expected) {
  const py::object held = taken(value);
  const int same = held ? PyObject_RichCompareBool(held.ptr(), expected, Py_EQ) : 0;
  if (same < 0) PyErr_Clear();
  return same == 1;
}

}  // namespace

py::object attribute(PyObject* x, PyObject* name) { return taken(PyObject_GetAttr(x, name)); }

bool is_tensor(PyObject* x) {
  const Torch& t = torch();
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  return type == t.tensor || type == t.parameter;
}

void* new_address(PyObject* x) {
  const py::object address = taken(ask(x, torch().data_ptr));
  return address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
}

void* values_address(PyObject* x) { return is(ask(x, torch().is_neg), Py_False) ? new_address(x) : nullptr; }

int64_t count_elements(PyObject* shape, int64_t most) {
  if (shape == nullptr || !PyTuple_Check(shape)) return -1;
  int64_t elements = 1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
    if (size == -1) PyErr_Clear();  // no int of a size
    if (size < 1 || static_cast<double>(elements) * static_cast<double>(size) > static_cast<double>(most)) return -1;
    elements *= size;
  }
  return elements;
}

bool floating(PyObject* dtype, fm::Dtype& out) {
  int code = 0;
  while (code < 4 && dtype != torch().dtypes[code]) ++code;
  out = static_cast<fm::Dtype>(code);
  return code < 4;
}

bool device_of(PyObject* x, int& out) {
  const Torch& t = torch();
  if (is(read(x, t.is_cpu), Py_True)) {
#if defined(FM_EMULATED)
    out = 0;  // a CPU tensor in the place of a GPU's
#else
    out = host;
#endif
    return true;
  }
  if (!is(read(x, t.is_cuda), Py_True)) return false;
  const py::object index = taken(ask(x, t.get_device));
  out = index ? static_cast<int>(PyLong_AsLong(index.ptr())) : host;
  return out >= 0;
}

bool view(PyObject* x, bool may_require_grad, View& out) {
  const Torch& t = torch();
  if (!is_tensor(x) || !device_of(x, out.device)) return false;
  if (!may_require_grad && !is(read(x, t.requires_grad), Py_False)) return false;
  if (!is(ask(x, t.is_contiguous), Py_True)) return false;
  if (!floating(taken(read(x, t.dtype)).ptr(), out.dtype)) return false;
  out.shape = taken(read(x, t.shape));
  out.elements = count_elements(out.shape.ptr(), most_elements(out.device));
  if (out.elements < 0) return false;
  out.data = values_address(x);
  return out.data != nullptr;
}

bool same_shape(const View& a, const View& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

bool same_layout(PyObject* shape, PyObject* strides, PyObject* other_strides) {
  if (!PyTuple_Check(shape) || !PyTuple_Check(strides) || !PyTuple_Check(other_strides)) return false;
  const Py_ssize_t dim = PyTuple_GET_SIZE(shape);
  if (PyTuple_GET_SIZE(strides) != dim || PyTuple_GET_SIZE(other_strides) != dim) return false;
  for (Py_ssize_t i = 0; i < dim; ++i) {
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i)) == 1) continue;
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i)) != PyLong_AsLongLong(PyTuple_GET_ITEM(other_strides, i)))
      return false;
  }
  return true;
}

Like::Like(py::object tensor)
    : shape_(tensor.attr("shape")),
      strides_(tensor.attr("stride")()),
      dtype_(tensor.attr("dtype")),
      device_(tensor.attr("device")) {}

const void* Like::address_of(PyObject* x) const {
  const Torch& t = torch();
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != t.tensor || !is(read(x, t.dtype), dtype_.ptr()) ||
      !equal(read(x, t.shape), shape_.ptr()) || !equal(read(x, t.device), device_.ptr()))
    return nullptr;
  const py::object strides = taken(ask(x, t.stride));
  if (!strides || !same_layout(shape_.ptr(), strides.ptr(), strides_.ptr())) return nullptr;
  return values_address(x);
}

py::object empty_like(PyObject* x) {
  return py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch().empty_like, x));
}

py::object empty_beside(PyObject* x, PyObject* shape, fm::Dtype dtype) {
  const Torch& t = torch();
  const py::object device = py::reinterpret_steal<py::object>(read(x, t.device));
  if (!device) return device;
  PyObject* arguments[] = {shape, t.dtypes[static_cast<int>(dtype)], device.ptr()};
  return py::reinterpret_steal<py::object>(PyObject_Vectorcall(t.empty, arguments, 1, t.empty_names));
}

}  // namespace fm_python
