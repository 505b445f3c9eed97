// Torch's tensors, read through Python's attributes: the build knows no header of torch.
//
// Whatever cannot be read, or is not ordinary, is refused, never guessed: Python's own path then deals with it and says
// what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"

namespace fm_python {

namespace py = pybind11;

// A new reference, or null without an exception.
py::object attribute(PyObject* x, PyObject* name);

// Exactly a torch.Tensor or a Parameter.
bool is_tensor(PyObject* x);

// The memory of a tensor that was just made; null without an exception where there is none.
void* new_address(PyObject* x);

// The memory of a tensor whose values are what its memory holds: no negative bit waits to be applied. Null where there
// is none, or where it is not so.
void* values_address(PyObject* x);

constexpr int host = -1;  // a device; the others are CUDA's, by their number

// The device of a tensor, if it is one that kernels are launched on.
bool device_of(PyObject* x, int& out);

// A contiguous tensor on the CPU or a CUDA device. The caller has the tensor's reference.
struct View {
  void* data;
  fm::Dtype dtype;
  int device;
  py::object shape;  // a tuple
  int64_t elements;  // > 0

  int64_t dim() const { return PyTuple_GET_SIZE(shape.ptr()); }
  int64_t size(int64_t i) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i)); }
};

// Torch's floating dtypes that the kernels know.
bool floating(PyObject* dtype, fm::Dtype& out);

// Elements of a shape, a tuple of ints; -1 where it is empty, has an empty dimension or is beyond `most`.
int64_t count_elements(PyObject* shape, int64_t most);

// Beyond these, outputs on the CPU come from the pool and the time is the kernel's: Python does it; on a device they
// are only far enough from what an index holds.
constexpr int64_t most_host_elements = int64_t{1} << 20, most_device_elements = int64_t{1} << 40;
constexpr int64_t most_elements(int device) { return device == host ? most_host_elements : most_device_elements; }

// Fills a view where x is a strided, contiguous tensor of exactly torch's own type and of a floating dtype, of as many
// elements as are taken on its device.
bool view(PyObject* x, bool may_require_grad, View& out);

bool same_shape(const View& a, const View& b);

// Whether two tensors of one shape have all their elements in the same places: the strides of dimensions of size 1 say
// nothing, and torch sets them to anything.
bool same_layout(PyObject* shape, PyObject* strides, PyObject* other_strides);

// A tensor that others are compared with.
class Like {
 public:
  explicit Like(py::object tensor);

  // The memory of a tensor of exactly torch's own type and of the same shape, layout, dtype and device, whose values
  // are what its memory holds; null for any other.
  const void* address_of(PyObject* x) const;

 private:
  py::object shape_, strides_, dtype_, device_;
};

// New tensors, on x's device whatever torch's default device and dtype; null with an exception set.
py::object empty_like(PyObject* x);
py::object empty_beside(PyObject* x, PyObject* shape, fm::Dtype dtype);

}  // namespace fm_python
