// Where a plain call's kernel runs: at once on the host, or in order with torch's work on a device.
#pragma once

#include "common/status.h"
#include "tensors.h"

namespace fm_python {

struct Place {
  int device = host;
  void* stream = nullptr;

  template <typename Arguments>
  fm::Status run(const Arguments& arguments, fm::Status (*on_host)(const Arguments&),
                 fm::Status (*on_device)(const Arguments&, void*)) const {
    if (device == host) return on_host(arguments);
    py::gil_scoped_release unlocked;  // a launch waits where the device's queue is full
    return on_device(arguments, stream);
  }
};

// The place of a device's kernels, torch's current stream. False where they are not to be launched from here: torch has
// another device current, or "auto" takes other kernels for CUDA.
bool place_of(int device, Place& out);

// Scratch of a number of doubles beside a tensor; none where there is nothing to hold or it would be the host's.
class Scratch {
 public:
  Scratch(PyObject* tensor, int device, int64_t doubles);
  bool failed() const { return failed_; }  // without an exception
  void* data() const { return data_; }

 private:
  py::object tensor_;
  void* data_ = nullptr;
  bool failed_ = false;
};

}  // namespace fm_python
