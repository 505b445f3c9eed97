#include "step_call.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "combine/combine.h"
#include "common/build_info.h"
#include "step_control/step_control.h"

namespace py = pybind11;

namespace fm_python {
namespace {

using Address = uintptr_t;

// Kernels shorter than this keep Python's lock: giving it away costs as much as they do.
constexpr int64_t locked_elements = 32768;

using Wanted = std::tuple<Address, int64_t, int64_t>;  // times, count, stride

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
void* pointer(const py::handle& address) { return pointer(address.cast<Address>()); }

void check(fm::Status status) {
  if (status != fm::Status::ok)
    throw std::runtime_error("fmkernels._C: a step failed with status " + std::to_string(static_cast<int>(status)));
}

fm::StepControlArguments control_arguments(int64_t rows, Address clock, Address count, fm::Dtype dtype, Address error,
                                           Address step, fm::Dtype time_dtype, Address times,
                                           const std::vector<double>& nodes, const std::vector<double>& rules,
                                           const Wanted& wanted) {
  if (rules.size() != sizeof(fm::StepRules) / sizeof(double) || nodes.size() > fm::max_stages)
    throw std::invalid_argument("fmkernels._C: step_control: the number of rules or stages");
  fm::StepControlArguments a{};
  a.rows = rows;
  a.clock = static_cast<double*>(pointer(clock));
  a.count = static_cast<int32_t*>(pointer(count));
  a.dtype = dtype;
  a.error = pointer(error);
  a.step = pointer(step);
  a.time_dtype = time_dtype;
  a.times = pointer(times);
  a.stages = static_cast<int>(nodes.size());
  std::copy(nodes.begin(), nodes.end(), a.nodes);
  std::copy(rules.begin(), rules.end(), reinterpret_cast<double*>(&a.rules));
  a.wanted = {static_cast<const double*>(pointer(std::get<0>(wanted))), std::get<1>(wanted), std::get<2>(wanted)};
  return a;
}

void step_control(bool on_cpu, int64_t rows, Address clock, Address count, int dtype, Address error, Address step,
                  int time_dtype, Address times, const std::vector<double>& nodes, const std::vector<double>& rules,
                  const Wanted& wanted, bool start, Address stream) {
  fm::StepControlArguments a = control_arguments(rows, clock, count, static_cast<fm::Dtype>(dtype), error, step,
                                                 static_cast<fm::Dtype>(time_dtype), times, nodes, rules, wanted);
  a.phase = start ? fm::StepPhase::first : fm::StepPhase::taken;
  check(on_cpu ? fm::step_control_cpu(a) : fm::step_control_cuda(a, pointer(stream)));
}

// What next() answers where the tensor cannot be used as it is.
constexpr int64_t irregular = -1;       // not a plain tensor laid out like the state
constexpr int64_t overlaps_stage = -2;  // in the memory of an earlier output that is still in use
constexpr int64_t overlaps_state = -3;  // in the memory of a state

class StepPlan {
 public:
  // The fields are described in fmkernels/solvers/adaptive/native_stepper.py, which makes them.
  StepPlan(py::object like, const py::dict& d) : like_(std::move(like)) {
    on_cpu_ = d["on_cpu"].cast<bool>();
    dtype_ = static_cast<fm::Dtype>(d["dtype"].cast<int>());
    rows_ = d["rows"].cast<int64_t>();
    inner_ = d["inner"].cast<int64_t>();
    bytes_ = rows_ * inner_ * fm::bytes_of(dtype_);
    steal_ = d["steal"].cast<bool>();
    states_[0] = static_cast<char*>(pointer(d["y"]));
    states_[1] = static_cast<char*>(pointer(d["y1"]));
    k0_ = static_cast<char*>(pointer(d["k0"]));
    read_like();
    make_control(d);
    make_combinations(d);
    make_rows(d);
  }

  // The derivative at y, a tensor that next() would take.
  void set_k0(const py::object& tensor) {
    k_[0] = tensor;
    data_[0] = address(tensor.ptr());
  }
  py::object stage(int s) const { return k_[static_cast<size_t>(s)]; }

  // The first stage's state.
  void first(Address stream) {
    stream_ = reinterpret_cast<void*>(stream);
    at_ = 1;
    combine(combinations_[0]);
  }

  // Takes the output of stage `at_`; forms the next stage's state, or judges the step and, unless it is to be looked at
  // before, takes it: then the answer is that of move().
  int64_t next(py::handle k) {
    const char* data = nullptr;
    if (!plain(k.ptr(), data)) return irregular;
    for (int s = 0; s < at_; ++s)
      if (overlap(data, data_[static_cast<size_t>(s)])) return overlaps_stage;
    if (overlap(data, states_[0]) || overlap(data, states_[1])) return overlaps_state;
    k_[static_cast<size_t>(at_)] = py::reinterpret_borrow<py::object>(k);
    data_[static_cast<size_t>(at_)] = data;
    ++at_;
    combine(combinations_[static_cast<size_t>(at_ - 1)]);
    if (at_ < stages()) return 0;
    judge(fm::StepPhase::taken);
    return look_ ? 0 : move();
  }

  void judge(fm::StepPhase phase) {
    control_.phase = phase;
    check(on_cpu_ ? fm::step_control_cpu(control_) : fm::step_control_cuda(control_, stream_));
  }
  // The first step sizes have been written to the error norms.
  void start(Address stream) {
    stream_ = reinterpret_cast<void*>(stream);
    judge(fm::StepPhase::first);
  }

  // Hairer's rule for the first step: the trial step's time and state, for one more output.
  void trial(Address stream) {
    stream_ = reinterpret_cast<void*>(stream);
    char* sizes = static_cast<char*>(sizes_);
    norm({states_[current_]}, {1.0}, sizes);
    norm({states_[current_], data_[0]}, {0.0, 1.0}, sizes + rows_ * real_bytes());
    control_.sizes = sizes;
    check(on_cpu_ ? fm::step_trial_cpu(control_) : fm::step_trial_cuda(control_, stream_));
    fm::CombineArguments a = plain_combination({states_[current_], data_[0]});
    a.operands[1].coefficient = {control_.step, 1, 1, 0.0, 1.0};
    run(a);
  }
  // Its output; answers like next().
  int64_t begin(py::handle k) {
    const char* data = nullptr;
    if (!plain(k.ptr(), data)) return irregular;
    if (overlap(data, data_[0])) return overlaps_stage;
    if (overlap(data, states_[0]) || overlap(data, states_[1])) return overlaps_state;
    norm({states_[current_], data_[0], data}, {0.0, -1.0, 1.0}, const_cast<void*>(control_.error));
    judge(fm::StepPhase::trial);
    return 0;
  }

  // 2 * rows still running (on the CPU) + the buffer that y is now in.
  int64_t move() {
    rows_arguments_.y = states_[current_];
    rows_arguments_.y1 = states_[1 - current_];
    for (size_t s = 0; s < k_.size(); ++s) rows_arguments_.k[s] = data_[s];
    rows_arguments_.k0_from = data_.front();
    rows_arguments_.k_last = data_.back();
    if (!on_cpu_) {
      check(fm::step_rows_cuda(rows_arguments_, stream_));
      return current_;
    }
    const int32_t *accept = control_.count + fm::at_accept * rows_, *status = control_.count + fm::at_status * rows_;
    int64_t accepted = 0, running = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      accepted += accept[r];
      running += status[r] == 0;
    }
    if (accepted == 0) return 2 * running + current_;
    const bool whole = steal_ && accepted == rows_;
    rows_arguments_.move = !whole;
    if (!whole || rows_arguments_.wanted.times != nullptr) release([&] { return fm::step_rows_cpu(rows_arguments_); });
    if (whole) {
      current_ = 1 - current_;
      k_.front() = k_.back();
      data_.front() = data_.back();
    } else {
      k_.front() = py::none();
      data_.front() = k0_;
    }
    return 2 * running + current_;
  }

  bool look_ = false;  // the caller looks at a step that was judged, and then calls move()
  bool steal_ = true;  // an output may become the derivative at y as it is

 private:
  int stages() const { return static_cast<int>(k_.size()); }

  template <typename Run>
  void release(Run run) const {
    if (bytes_ < locked_elements * 4) return check(run());
    fm::Status status;
    {
      py::gil_scoped_release unlocked;
      status = run();
    }
    check(status);
  }

  struct Combination {
    fm::CombineArguments arguments{};
    std::vector<int> columns;
  };

  void run(const fm::CombineArguments& a) const {
    release([&] { return on_cpu_ ? fm::combine_cpu(a) : fm::combine_cuda(a, stream_); });
  }

  void combine(Combination& c) {
    fm::CombineArguments& a = c.arguments;
    a.out = states_[1 - current_];
    a.operands[0].data = states_[current_];
    for (size_t i = 0; i < c.columns.size(); ++i) a.operands[i + 1].data = data_[static_cast<size_t>(c.columns[i])];
    run(a);
  }

  int64_t real_bytes() const { return dtype_ == fm::Dtype::f64 ? 8 : 4; }

  // y alone, of operands that begin with it.
  fm::CombineArguments plain_combination(const std::vector<const char*>& operands) const {
    fm::CombineArguments a{};
    a.dtype = dtype_;
    a.out = states_[1 - current_];
    a.rows = a.samples = rows_;
    a.inner = inner_;
    a.count = static_cast<int>(operands.size());
    for (size_t i = 0; i < operands.size(); ++i) {
      a.operands[i].data = operands[i];
      a.operands[i].coefficient = {nullptr, 1, 0, i == 0 ? 1.0 : 0.0};
    }
    return a;
  }

  // Norms of a combination over the tolerance at y.
  void norm(const std::vector<const char*>& operands, const std::vector<double>& weights, void* norms) const {
    fm::CombineArguments a = plain_combination(operands);
    for (size_t i = 0; i < operands.size(); ++i) a.operands[i].error = {nullptr, 1, 0, weights[i]};
    const fm::CombineArguments& last = combinations_.back().arguments;
    a.has_error = true;
    a.atol = last.atol;
    a.rtol = last.rtol;
    a.norm = norms;
    a.workspace = last.workspace;
    run(a);
  }

  void make_control(const py::dict& d) {
    const auto nodes = d["nodes"].cast<std::vector<double>>();
    if (nodes.size() < 2) throw std::invalid_argument("StepPlan: nodes");
    control_ = control_arguments(rows_, d["clock"].cast<Address>(), d["count"].cast<Address>(),
                                 dtype_ == fm::Dtype::f64 ? fm::Dtype::f64 : fm::Dtype::f32, d["error"].cast<Address>(),
                                 d["step"].cast<Address>(), static_cast<fm::Dtype>(d["time_dtype"].cast<int>()),
                                 d["times"].cast<Address>(), nodes, d["rules"].cast<std::vector<double>>(),
                                 d["wanted"].cast<Wanted>());
    control_.order = d["order"].cast<double>();
    sizes_ = pointer(d["sizes"]);
    k_.resize(nodes.size(), py::none());
    data_.resize(nodes.size(), nullptr);
  }

  // Coefficient i of a combination is its number times the step; that of y is 1, in the error 0.
  void make_combinations(const py::dict& d) {
    const auto columns = d["columns"].cast<std::vector<std::vector<int>>>();
    const auto weights = d["weights"].cast<std::vector<std::vector<double>>>();
    const auto error = d["error_weights"].cast<std::vector<double>>();
    if (columns.size() != k_.size() || weights.size() != columns.size())
      throw std::invalid_argument("StepPlan: columns");
    for (size_t s = 0; s < columns.size(); ++s) {
      Combination c;
      c.columns = columns[s];
      fm::CombineArguments& a = c.arguments;
      a.dtype = dtype_;
      a.rows = rows_;
      a.inner = inner_;
      a.samples = rows_;
      a.count = 1 + static_cast<int>(columns[s].size());
      if (a.count > fm::max_operands || weights[s].size() != columns[s].size())
        throw std::invalid_argument("StepPlan: weights");
      const bool last = s + 1 == columns.size();
      a.operands[0].coefficient = {nullptr, 1, 0, 1.0};
      a.operands[0].error = {nullptr, 1, 0, 0.0};
      for (size_t i = 0; i < columns[s].size(); ++i) {
        a.operands[i + 1].coefficient = {control_.step, 1, 1, 0.0, weights[s][i]};
        if (last) a.operands[i + 1].error = {control_.step, 1, 1, 0.0, error.at(i)};
      }
      if (last) {
        a.has_error = true;
        a.atol = d["atol"].cast<double>();
        a.rtol = d["rtol"].cast<double>();
        a.norm = const_cast<void*>(control_.error);
        a.workspace = pointer(d["workspace"]);
      }
      combinations_.push_back(std::move(c));
    }
  }

  void make_rows(const py::dict& d) {
    const auto polynomials = d["polynomials"].cast<std::vector<std::vector<double>>>();
    fm::StepRowsArguments& a = rows_arguments_;
    a.dtype = dtype_;
    a.rows = rows_;
    a.inner = inner_;
    a.clock = control_.clock;
    a.count = control_.count;
    a.move = true;
    a.k0 = k0_;
    a.wanted = control_.wanted;
    a.stages = stages();
    if (polynomials.size() != k_.size()) throw std::invalid_argument("StepPlan: polynomials");
    for (size_t s = 0; s < polynomials.size(); ++s) {
      if (polynomials[s].size() > fm::max_degree) throw std::invalid_argument("StepPlan: polynomials");
      std::copy(polynomials[s].begin(), polynomials[s].end(), a.polynomials[s]);
      a.degree = std::max(a.degree, static_cast<int>(polynomials[s].size()));
    }
    a.ids = static_cast<const int64_t*>(pointer(d["ids"]));
    a.out = pointer(d["out"]);
    a.out_stride = d["out_stride"].cast<int64_t>();
  }

  // ------------------------------------------------------------------ tensors

  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

  void read_like() {
    tensor_type_ = py::module_::import("torch").attr("Tensor").ptr();
    shape_ = like_.attr("shape");
    strides_ = like_.attr("stride")();
    dtype_object_ = like_.attr("dtype");
    device_ = like_.attr("device");
  }

  static bool equal(PyObject* value, PyObject* expected) {
    if (value == nullptr) {
      PyErr_Clear();
      return false;
    }
    const int same = PyObject_RichCompareBool(value, expected, Py_EQ);
    Py_DECREF(value);
    if (same < 0) PyErr_Clear();
    return same == 1;
  }

  const char* address(PyObject* k) const {
    static PyObject* data_ptr = name("data_ptr");
    const py::object value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(k, data_ptr));
    if (!value) throw py::error_already_set();
    return static_cast<const char*>(PyLong_AsVoidPtr(value.ptr()));
  }

  // Exactly a tensor, of the state's shape, strides, dtype and device.
  bool plain(PyObject* k, const char*& data) const {
    static PyObject *shape = name("shape"), *stride = name("stride"), *dtype = name("dtype"), *device = name("device");
    if (reinterpret_cast<PyObject*>(Py_TYPE(k)) != tensor_type_) return false;
    if (!equal(PyObject_GetAttr(k, dtype), dtype_object_.ptr()) || !equal(PyObject_GetAttr(k, shape), shape_.ptr()) ||
        !equal(PyObject_CallMethodNoArgs(k, stride), strides_.ptr()) ||
        !equal(PyObject_GetAttr(k, device), device_.ptr()))
      return false;
    data = address(k);
    return true;
  }

  bool overlap(const char* a, const char* b) const { return a < b + bytes_ && b < a + bytes_; }

  py::object like_, shape_, strides_, dtype_object_, device_;
  PyObject* tensor_type_ = nullptr;
  bool on_cpu_ = true;
  fm::Dtype dtype_;
  int64_t rows_, inner_, bytes_;
  char* states_[2];  // y is in states_[current_], the stages' states and the new one are formed in the other
  int current_ = 0;
  char* k0_;
  void* sizes_;
  void* stream_ = nullptr;
  int at_ = 1;  // the stage whose output comes next
  std::vector<py::object> k_;
  std::vector<const char*> data_;
  std::vector<Combination> combinations_;
  fm::StepControlArguments control_{};
  fm::StepRowsArguments rows_arguments_{};
};

}  // namespace

void define_steps(py::module_& m) {
  m.def("step_control", &step_control);
  py::class_<StepPlan>(m, "StepPlan")
      .def(py::init<py::object, const py::dict&>())
      .def("set_k0", &StepPlan::set_k0)
      .def("stage", &StepPlan::stage)
      .def("first", &StepPlan::first)
      .def("next", &StepPlan::next)
      .def("start", &StepPlan::start)
      .def("trial", &StepPlan::trial)
      .def("begin", &StepPlan::begin)
      .def("move", &StepPlan::move)
      .def_readwrite("look", &StepPlan::look_)
      .def_readwrite("steal", &StepPlan::steal_);
}

}  // namespace fm_python
