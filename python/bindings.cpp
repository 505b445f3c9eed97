// fmkernels._C: what is no operation's own; the operations' files add themselves (binding.h).
#include <pybind11/stl.h>

#include "binding.h"
#include "common/build_info.h"
#include "common/isa.h"
#include "common/pool.h"
#include "common/workspace.h"

namespace fm_python {
namespace {

// A block of the pool behind Python's buffer protocol: torch.frombuffer keeps it alive as long as the
// tensor's storage.
class Block {
 public:
  explicit Block(int64_t bytes) : block_(fm::pool_allocate(bytes)), bytes_(bytes) {}
  ~Block() { fm::pool_free(block_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  py::buffer_info buffer() const {
    return {block_.data, 1, py::format_descriptor<uint8_t>::format(), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  fm::PoolBlock block_;
  int64_t bytes_;
};

}  // namespace
}  // namespace fm_python

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Kernels of fmkernels. Use the Python functions of the package; these take addresses and check "
      "nothing.";
  fm_python::define_all(m);
  m.def("cuda_workspace_elements", &fm::workspace_elements_cuda);
  m.def("cuda_architectures", &fm::cuda_architectures, "CUDA architectures that were built, e.g. ['80', '90'].");
  using fm_python::Block;
  namespace py = pybind11;
  py::class_<Block>(m, "Block", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer(&Block::buffer);
  m.def("pool_cached_bytes", &fm::pool_cached_bytes, "Bytes of freed large outputs that are kept for the next call.");
  m.def("pool_limit", &fm::pool_limit, "Keep at most this many bytes of freed large outputs.");
  m.def("isa", &fm::isa_name, "The CPU instruction set chosen at run time.");
  m.def("max_threads", &fm::max_threads, "Threads that the CPU kernels may use (torch.set_num_threads).");
  m.def("build_info", &fm::build_info, "Compiler and options of the build.");
}
