"""The bugs of tools/mutants.py: (file, old text, new text, the test or tests that see it).

What they are like: an option that is ignored, a field left out of a key, a sign in a rare branch, a tolerance in the
place of another, a wrong rule at an end. A bug that a reader or a user finds, and no test found, gets a line here.
"""

from __future__ import annotations

SETTINGS = "tests/test_solver_settings.py"
KEPT = f"{SETTINGS}::test_no_solve_answers_with_the_settings_of_another"
IMPLICIT_CONTROL = f"{SETTINGS}::test_step_control_of_implicit_methods"
INSIDE = f"{SETTINGS}::test_no_call_leaves_the_interval"
FIRST_STEP = f"{SETTINGS}::test_a_given_first_step_is_only_the_first"

SOLVERS = "fmkernels/solvers"

MUTANTS: list[tuple[str, str, str, str | tuple[str, ...]]] = [
    # ------------------------------------------------------------------ what a solve keeps for the next
    (
        f"{SOLVERS}/adaptive/kept_steppers.py",
        "problem.atol, problem.rtol, problem.shared",
        "problem.atol, problem.shared",
        KEPT,
    ),
    (
        f"{SOLVERS}/adaptive/kept_steppers.py",
        "problem.atol, problem.rtol, problem.shared",
        "problem.rtol, problem.shared",
        KEPT,
    ),
    (f"{SOLVERS}/adaptive/kept_steppers.py", "(problem.rules, problem.atol", "(problem.atol", KEPT),
    (f"{SOLVERS}/adaptive/kept_steppers.py", "y0.shape, y0.dtype, rows)", "y0.shape, rows)", KEPT),
    (f"{SOLVERS}/adaptive/kept_steppers.py", "if before != interval:", "if False:", KEPT),
    # ------------------------------------------------------------------ options of step control
    (
        f"{SOLVERS}/adaptive/options.py",
        '            dfactor=float(options.get("dfactor", 0.2)),\n',
        "",
        (f"{SETTINGS}::test_dfactor_bounds_how_much_a_step_shrinks", IMPLICIT_CONTROL),
    ),
    (
        f"{SOLVERS}/adaptive/options.py",
        '            ifactor=float(options.get("ifactor", 10.0)),\n',
        "",
        (f"{SETTINGS}::test_ifactor_bounds_how_much_a_step_grows", IMPLICIT_CONTROL),
    ),
    (
        f"{SOLVERS}/adaptive/options.py",
        '            safety=float(options.get("safety", 0.9)),\n',
        "",
        (f"{SETTINGS}::test_safety_scales_the_next_step", IMPLICIT_CONTROL),
    ),
    (f"{SOLVERS}/equations/solves.py", "        engine = replace(engine, first_step=None)\n", "", FIRST_STEP),
    (f"{SOLVERS}/equations/dense.py", "        engine = replace(engine, first_step=None)\n", "", FIRST_STEP),
    (f"{SOLVERS}/equations/events.py", "        engine = replace(engine, first_step=None)\n", "", FIRST_STEP),
    (f"{SOLVERS}/adaptive/stepper.py", "torch.minimum(h0, span.abs())", "h0", INSIDE),
    (
        "csrc/step_control/step_control_body.h",
        "copysign(smaller(size, fabs(span)), span)",
        "copysign(size, span)",
        INSIDE,
    ),
    (f"{SOLVERS}/implicit/solve.py", "            controller.dfactor,\n", "            0.2,\n", IMPLICIT_CONTROL),
    # ------------------------------------------------------------------ adjoint, events, replay
    (
        f"{SOLVERS}/equations/adjoint.py",
        "_smallest(atol) if adjoint_atol is None else adjoint_atol",
        "_smallest(rtol) if adjoint_atol is None else adjoint_atol",
        "tests/test_adjoint.py::test_the_backward_solve_has_the_forward_ones_tolerances",
    ),
    (
        f"{SOLVERS}/equations/adjoint.py",
        "_smallest(atol) if adjoint_atol is None else adjoint_atol",
        "_smallest(atol) if adjoint_atol is None else adjoint_rtol or 0.0",
        "tests/test_adjoint.py::test_each_backward_tolerance_is_its_own",
    ),
    (
        f"{SOLVERS}/equations/events.py",
        "float(tolerances.min())",
        "float(tolerances.max())",
        "tests/test_events.py::test_the_event_is_found_to_the_smallest_atol",
    ),
    (
        f"{SOLVERS}/equations/events.py",
        "begin = done if isinstance(method, RungeKutta) else 0",
        "begin = done",
        "tests/test_events.py::test_a_fixed_grid_is_the_same_with_an_event",
    ),
    (
        f"{SOLVERS}/equations/outputs.py",
        "(h != 0.0) & ~reached",
        "(h != 0.0)",
        "tests/test_odeint_gradients.py::test_outputs_where_steps_end_are_counted_once",
    ),
    # ------------------------------------------------------------------ grids and methods
    (
        f"{SOLVERS}/sampling/grids.py",
        "self.sigma_min ** np.linspace(0.0, 1.0, steps)",
        "self.sigma_min ** np.linspace(0.0, 1.0, steps + 1)[:-1]",
        "tests/test_grids.py::test_logarithmic_levels_reach_the_least_before_data",
    ),
    (
        f"{SOLVERS}/methods/diffusion.py",
        "nodes = ei.places(history, start, end)[: _order(self.order, builder, self.lower_order_final)]",
        "nodes = ei.places(history, start, end)[: self.order]",
        "tests/test_diffusion_solvers.py::test_deis_and_lms_integrate_their_polynomials",
    ),
    (
        f"{SOLVERS}/methods/tableaus.py",
        "error=(-1 / 512, 0.0, 1 / 512),",
        "error=(-1 / 256, 0.0, 1 / 256),",
        "tests/test_tableaus.py::test_error_estimates_are_the_published_ones",
    ),
]
