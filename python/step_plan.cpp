// The engine of csrc/step_plan behind Python: network outputs come as tensors, which are held here while the engine
// uses their memory. One that is no plain tensor like the state, or overlaps what is in use, is not taken: the caller
// is told, and deals with it.
#include "step_plan/step_plan.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "step_control.h"
#include "tensors.h"

namespace fm_python {
namespace {

// Steps on smaller states keep Python's lock: giving it away costs as much as they do.
constexpr int64_t locked_bytes = int64_t{1} << 17;

// What next() and begin() answer where the tensor cannot be used as it is.
constexpr int64_t irregular = -1;       // not a plain tensor laid out like the state
constexpr int64_t overlaps_stage = -2;  // in the memory of an earlier output that is still in use
constexpr int64_t overlaps_state = -3;  // in the memory of a state

class Plan {
 public:
  Plan(py::object like, const fm::StepPlanSettings& settings)
      : like_(std::move(like)), plan_(settings), held_(settings.tableau.nodes.size(), py::none()) {}

  int current() const { return plan_.current(); }
  bool look() const { return plan_.look; }
  void set_look(bool look) { plan_.look = look; }
  bool steal() const { return plan_.steal; }
  void set_steal(bool steal) { plan_.steal = steal; }

  // The derivative at y: whether it is a tensor that next() would take, and was taken.
  bool set_k0(const py::object& tensor) {
    const Use use(*this);
    const void* data = like_.address_of(tensor.ptr());
    if (data == nullptr) return false;
    plan_.set_derivative(data);
    held_.front() = tensor;
    return true;
  }
  // The output of stage s; None for the derivative at y where it is in k0.
  py::object stage(int s) const { return held_.at(static_cast<size_t>(s)); }

  int first(Address stream) {
    const Use use(*this);
    run([&] { return plan_.first(pointer(stream)); });
    return plan_.current();
  }

  // Takes the output of the next stage; where it was the last, and the caller does not look first, moves.
  int64_t next(py::handle k) {
    const Use use(*this);
    const void* data = like_.address_of(k.ptr());
    if (data == nullptr) return irregular;
    const int64_t refused = refusal(plan_.admits(data));
    if (refused != 0) return refused;
    const int stage = plan_.stage();
    held_[static_cast<size_t>(stage)] = py::reinterpret_borrow<py::object>(k);
    run([&] { return plan_.take(data); });
    return stage + 1 < plan_.stages() || plan_.judged() ? 0 : moved();
  }

  int64_t move() {
    const Use use(*this);
    run([&] { return plan_.move(); });
    return moved();
  }

  void start(Address stream) {
    const Use use(*this);
    run([&] { return plan_.start(pointer(stream)); });
  }
  void trial(Address stream) {
    const Use use(*this);
    run([&] { return plan_.trial(pointer(stream)); });
  }
  int64_t begin(py::handle k) {
    const Use use(*this);
    const void* data = like_.address_of(k.ptr());
    if (data == nullptr) return irregular;
    const int64_t refused = refusal(plan_.admits_trial(data));
    if (refused == 0) run([&] { return plan_.begin(data); });
    return refused;
  }

 private:
  // One call at a time: a kernel may run without Python's lock, and then another thread come here.
  class Use {
   public:
    explicit Use(Plan& plan) : plan_(plan) {
      if (plan.used_) throw std::runtime_error("StepPlan: expected one call at a time, got another thread's");
      plan.used_ = true;
    }
    ~Use() { plan_.used_ = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Plan& plan_;
  };

  template <typename Run>
  void run(Run run) {
    if (plan_.state_bytes() < locked_bytes)
      check(run());
    else
      run_unlocked(run);
  }

  static int64_t refusal(fm::StepPlan::Output output) {
    if (output == fm::StepPlan::Output::unexpected)
      throw std::runtime_error("StepPlan: expected first() before the outputs of a step");
    return output == fm::StepPlan::Output::overlaps_stage   ? overlaps_stage
           : output == fm::StepPlan::Output::overlaps_state ? overlaps_state
                                                            : 0;
  }

  // 2 * rows still running (on the CPU) + the buffer that y is now in.
  int64_t moved() {
    if (plan_.took_last())
      held_.front() = held_.back();
    else if (plan_.on_cpu() && plan_.in_k0())
      held_.front() = py::none();
    return 2 * (plan_.on_cpu() ? plan_.running() : 0) + plan_.current();
  }

  Like like_;
  fm::StepPlan plan_;
  std::vector<py::object> held_;  // a tensor a stage
  bool used_ = false;
};

template <typename T>
auto address_of(T* fm::StepPlanSettings::* member) {
  return [member](fm::StepPlanSettings& s, Address address) { s.*member = static_cast<T*>(pointer(address)); };
}

template <typename T>
auto reader_of(T* fm::StepPlanSettings::* member) {
  return [member](const fm::StepPlanSettings& s) { return reinterpret_cast<Address>(s.*member); };
}

FM_BINDING(step_plan) {
  using Settings = fm::StepPlanSettings;
  using Table = std::vector<std::vector<double>>;
  py::class_<fm::StepTableau>(m, "StepTableau")
      .def(py::init([](std::vector<double> nodes, std::vector<std::vector<int>> columns, Table weights,
                       std::vector<double> error_weights, Table polynomials, double order) {
             return fm::StepTableau{std::move(nodes),         std::move(columns),     std::move(weights),
                                    std::move(error_weights), std::move(polynomials), order};
           }),
           py::arg("nodes"), py::arg("columns"), py::arg("weights"), py::arg("error_weights"), py::arg("polynomials"),
           py::arg("order"));
  py::class_<fm::StepRules>(m, "StepRules").def(py::init(&rules_of));
  py::class_<fm::WantedTimes>(m, "WantedTimes").def(py::init(&wanted_of));
  py::class_<Settings> settings(m, "StepPlanSettings");
  settings.def(py::init<>())
      .def_readwrite("tableau", &Settings::tableau)
      .def_readwrite("rules", &Settings::rules)
      .def_readwrite("wanted", &Settings::wanted)
      .def_readwrite("atol", &Settings::atol)
      .def_readwrite("rtol", &Settings::rtol)
      .def_readwrite("on_cpu", &Settings::on_cpu)
      .def_property(
          "dtype", [](const Settings& s) { return static_cast<int>(s.dtype); },
          [](Settings& s, int code) { s.dtype = static_cast<fm::Dtype>(code); })
      .def_property(
          "time_dtype", [](const Settings& s) { return static_cast<int>(s.time_dtype); },
          [](Settings& s, int code) { s.time_dtype = static_cast<fm::Dtype>(code); })
      .def_readwrite("rows", &Settings::rows)
      .def_readwrite("inner", &Settings::inner)
      .def_readwrite("out_stride", &Settings::out_stride);
  const auto buffer = [&](const char* name, auto member) {
    settings.def_property(name, reader_of(member), address_of(member));
  };
  buffer("y", &Settings::y);
  buffer("y1", &Settings::y1);
  buffer("k0", &Settings::k0);
  buffer("clock", &Settings::clock);
  buffer("count", &Settings::count);
  buffer("step", &Settings::step);
  buffer("times", &Settings::times);
  buffer("error", &Settings::error);
  buffer("sizes", &Settings::sizes);
  buffer("workspace", &Settings::workspace);
  buffer("ids", &Settings::ids);
  buffer("out", &Settings::out);
  py::class_<Plan>(m, "StepPlan")
      .def(py::init<py::object, const Settings&>())
      .def("set_k0", &Plan::set_k0)
      .def("stage", &Plan::stage)
      .def("first", &Plan::first)
      .def("next", &Plan::next)
      .def("start", &Plan::start)
      .def("trial", &Plan::trial)
      .def("begin", &Plan::begin)
      .def("move", &Plan::move)
      .def_property_readonly("current", &Plan::current)
      .def_property("look", &Plan::look, &Plan::set_look)
      .def_property("steal", &Plan::steal, &Plan::set_steal);
}

}  // namespace
}  // namespace fm_python
