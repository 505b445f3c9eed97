// fmkernels._C: addresses, sizes and codes in, an exception for any status but ok.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "combine/combine.h"
#include "common/build_info.h"
#include "common/isa.h"
#include "common/pool.h"
#include "common/workspace.h"
#include "plain_call.h"
#include "random/random.h"
#include "regression_loss/regression_loss.h"
#include "row_dots/row_dots.h"
#include "step_call.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Lookup = std::tuple<Address, int64_t, int64_t, double>;  // data, rows_per_entry, stride, value

constexpr int cpu = 0;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

fm::Coefficient coefficient(const Lookup& c) {
  return {pointer(std::get<0>(c)), std::get<1>(c), std::get<2>(c), std::get<3>(c)};
}

void check(fm::Status status) {
  const int code = static_cast<int>(status);
  if (status == fm::Status::ok) return;
  if (status == fm::Status::bad_argument)
    throw std::invalid_argument("fmkernels._C: a dtype, kind or size out of range");
  if (status == fm::Status::no_cuda) throw std::runtime_error("fmkernels._C: built without CUDA");
  throw std::runtime_error("fmkernels._C: " + fm::cuda_error_text(code - static_cast<int>(fm::Status::cuda_error)));
}

// operands[i] is a tensor's address where streams[i] < 0, else a seed's.
void fill_operands(fm::Operand* operands, int limit, const std::vector<Address>& data,
                   const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets) {
  if (data.empty() || data.size() > static_cast<size_t>(limit) || streams.size() != data.size() ||
      offsets.size() != data.size())
    check(fm::Status::bad_argument);
  for (size_t i = 0; i < data.size(); ++i) {
    const bool noise = streams[i] >= 0;
    operands[i].data = noise ? nullptr : pointer(data[i]);
    operands[i].seed = noise ? static_cast<const int64_t*>(pointer(data[i])) : nullptr;
    operands[i].stream = streams[i];
    operands[i].offset = offsets[i];
  }
}

void combine(int device, int dtype, Address out, int64_t rows, int64_t inner, const std::vector<Address>& data,
             const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets,
             const std::vector<Address>& stores, const std::vector<Lookup>& coefficients,
             const std::vector<Lookup>& errors, double atol, double rtol, Address norm, int64_t samples,
             Address workspace, Address stream) {
  fm::CombineArguments a{};
  fill_operands(a.operands, fm::max_operands, data, streams, offsets);
  if (stores.size() != data.size() || coefficients.size() != data.size() ||
      (!errors.empty() && errors.size() != data.size()))
    check(fm::Status::bad_argument);
  for (size_t i = 0; i < data.size(); ++i) {
    a.operands[i].store = pointer(stores[i]);
    a.operands[i].coefficient = coefficient(coefficients[i]);
    if (!errors.empty()) a.operands[i].error = coefficient(errors[i]);
  }
  a.dtype = static_cast<fm::Dtype>(dtype);
  a.out = pointer(out);
  a.rows = rows;
  a.inner = inner;
  a.count = static_cast<int>(data.size());
  a.has_error = !errors.empty();
  a.atol = atol;
  a.rtol = rtol;
  a.norm = pointer(norm);
  a.samples = samples;
  a.workspace = pointer(workspace);
  py::gil_scoped_release release;
  const fm::Status status = device == cpu ? fm::combine_cpu(a) : fm::combine_cuda(a, pointer(stream));
  if (status != fm::Status::ok) {
    py::gil_scoped_acquire acquire;
    check(status);
  }
}

void regression_loss(int device, int pred_dtype, Address pred, Address grad, int64_t rows, int64_t inner, int dtype,
                     const std::vector<Address>& data, const std::vector<int64_t>& streams,
                     const std::vector<int64_t>& offsets, const std::vector<Lookup>& lookups, Address mask,
                     int64_t mask_elements, int kind, double delta, bool scale_grad, Address loss, int64_t groups,
                     Address workspace, Address stream) {
  fm::RegressionLossArguments a{};
  fill_operands(a.operands, fm::max_loss_operands, data, streams, offsets);
  if (lookups.size() != data.size() + 2) check(fm::Status::bad_argument);
  for (size_t i = 0; i < data.size(); ++i) a.operands[i].coefficient = coefficient(lookups[i]);
  a.pred_dtype = static_cast<fm::Dtype>(pred_dtype);
  a.pred = pointer(pred);
  a.grad = pointer(grad);
  a.dtype = static_cast<fm::Dtype>(dtype);
  a.rows = rows;
  a.inner = inner;
  a.count = static_cast<int>(data.size());
  a.weight = coefficient(lookups[data.size()]);
  a.scale = coefficient(lookups[data.size() + 1]);
  a.scale_grad = scale_grad;
  a.mask = static_cast<const bool*>(pointer(mask));
  a.mask_elements = mask_elements;
  a.kind = static_cast<fm::Penalty>(kind);
  a.delta = delta;
  a.loss = pointer(loss);
  a.groups = groups;
  a.workspace = pointer(workspace);
  py::gil_scoped_release release;
  const fm::Status status = device == cpu ? fm::regression_loss_cpu(a) : fm::regression_loss_cuda(a, pointer(stream));
  if (status != fm::Status::ok) {
    py::gil_scoped_acquire acquire;
    check(status);
  }
}

void random_numbers(int device, int dtype, int kind, Address out, int64_t count, Address seed, int64_t stream_number,
                    int64_t offset, Address stream) {
  const fm::RandomArguments a{static_cast<fm::RandomKind>(kind),
                              static_cast<fm::Dtype>(dtype),
                              pointer(out),
                              count,
                              static_cast<const int64_t*>(pointer(seed)),
                              stream_number,
                              offset};
  py::gil_scoped_release release;
  const fm::Status status = device == cpu ? fm::random_cpu(a) : fm::random_cuda(a, pointer(stream));
  if (status != fm::Status::ok) {
    py::gil_scoped_acquire acquire;
    check(status);
  }
}

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
  py::gil_scoped_release release;
  const fm::Status status = device == cpu ? fm::row_dots_cpu(a) : fm::row_dots_cuda(a, pointer(stream));
  if (status != fm::Status::ok) {
    py::gil_scoped_acquire acquire;
    check(status);
  }
}

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

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Kernels of fmkernels. Use the Python functions of the package; these take addresses and check "
      "nothing.";
  m.def("combine", &combine);
  m.def("regression_loss", &regression_loss);
  m.def("random", &random_numbers);
  m.def("row_dots", &row_dots);
  m.def("combine_plain", &fm_python::combine_plain);
  m.def("combine_into_buffer", &fm_python::combine_into_buffer);
  m.def("regression_loss_plain", &fm_python::regression_loss_plain);
  m.def("row_dots_plain", &fm_python::row_dots_plain);
  fm_python::define_steps(m);
  m.def("cuda_workspace_elements", &fm::workspace_elements_cuda);
  m.def("cuda_architectures", &fm::cuda_architectures, "CUDA architectures that were built, e.g. ['80', '90'].");
  py::class_<Block>(m, "Block", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer(&Block::buffer);
  m.def("pool_cached_bytes", &fm::pool_cached_bytes, "Bytes of freed large outputs that are kept for the next call.");
  m.def("pool_limit", &fm::pool_limit, "Keep at most this many bytes of freed large outputs.");
  m.def("isa", &fm::isa_name, "The CPU instruction set chosen at run time.");
  m.def("max_threads", &fm::max_threads, "Threads that the CPU kernels may use (torch.set_num_threads).");
  m.def("build_info", &fm::build_info, "Compiler and options of the build.");
}
