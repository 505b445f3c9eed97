"""Bugs of the solvers for tools/mutants.py: (file, old text, new text, the test or tests that see it).

What they are like: an option that is ignored, a field left out of a key, a sign in a rare branch, a tolerance in the
place of another, a wrong rule at an end. A bug that a reader or a user finds, and no test found, gets a line here or in
mutants_elsewhere.py.
"""

from __future__ import annotations

SETTINGS = "tests/test_solver_settings.py"
KEPT = f"{SETTINGS}::test_no_solve_answers_with_the_settings_of_another"
IMPLICIT_CONTROL = f"{SETTINGS}::test_step_control_of_implicit_methods"
INSIDE = f"{SETTINGS}::test_no_call_leaves_the_interval"
FIRST_STEP = f"{SETTINGS}::test_a_given_first_step_is_only_the_first"
CONTROL = "tests/test_step_control.py"
ADAPTIVE_TESTS = "tests/test_adaptive.py"
BATCHES = "tests/test_adaptive_batches.py"
ADJOINT = "tests/test_adjoint.py"
EVENTS = "tests/test_events.py"
OPTIONS = "tests/test_odeint_options.py"
IMPLICIT = "tests/test_implicit.py"
DIFFUSION = "tests/test_diffusion_solvers.py"
STOCHASTIC = "tests/test_stochastic.py"
CACHES = "tests/test_caches.py"
TIMES = "tests/test_given_times.py"
DENSITIES = "tests/test_likelihood_grids.py"
RARE = "tests/test_rare_branches.py"
WAITING = "tests/test_waiting.py"

SOLVERS = "fmkernels/solvers"
KEEPER = f"{SOLVERS}/adaptive/kept_steppers.py"
CONTROL_BODY = "csrc/step_control/step_control_body.h"
SDE = f"{SOLVERS}/methods/sde.py"

MUTANTS: list[tuple[str, str, str, str | tuple[str, ...]]] = [
    # ------------------------------------------------------------------ what a solve keeps for the next
    (KEEPER, "problem.atol, problem.rtol, problem.shared", "problem.atol, problem.shared", KEPT),
    (KEEPER, "problem.atol, problem.rtol, problem.shared", "problem.rtol, problem.shared", KEPT),
    (KEEPER, "(problem.rules, problem.atol", "(problem.atol", KEPT),
    (KEEPER, "y0.shape, y0.dtype, rows)", "y0.shape, rows)", KEPT),
    (KEEPER, "if before != interval:", "if False:", KEPT),
    # ------------------------------------------------------------------ options of step control
    (f"{SOLVERS}/adaptive/options.py", "float(self.min_step),", "0.0,", f"{ADAPTIVE_TESTS}::test_min_and_max_step"),
    (
        f"{SOLVERS}/adaptive/options.py",
        "else float(share)",
        "else 0.5",
        f"{BATCHES}::test_compaction_saves_evaluations",
    ),
    (f"{SOLVERS}/adaptive/stepper.py", "torch.minimum(h0, span.abs())", "h0", INSIDE),
    (CONTROL_BODY, "copysign(smaller(size, fabs(span)), span)", "copysign(size, span)", INSIDE),
    (CONTROL_BODY, "ratio < 1 ? rules.least_growth : rules.dfactor", "rules.dfactor", CONTROL),
    (CONTROL_BODY, "accept ? rules.ifactor : smaller(rules.ifactor, rules.safety)", "rules.ifactor", CONTROL),
    (CONTROL_BODY, "      row.ratio_2 = row.ratio_1;\n", "", CONTROL),
    (CONTROL_BODY, "step_stretch = 1.01", "step_stretch = 1.0", CONTROL),
    (CONTROL_BODY, "row.failures = finite ? 0 : row.failures + 1;", "row.failures += finite ? 0 : 1;", CONTROL),
    (
        "fmkernels/ops/step_control/reference.py",
        "moved = torch.where(h == t_end - t, t_end, t + h)",
        "moved = t + h",
        RARE,
    ),
    (
        f"{SOLVERS}/adaptive/controllers.py",
        "-(i + p + d) / order, (p + 2.0 * d) / order, -d / order",
        "-(i + p + d) / order, (p + d) / order, -d / order",
        f"{CONTROL}::test_history_of_errors",
    ),
    (f"{SOLVERS}/implicit/solve.py", "            controller.dfactor,\n", "            0.2,\n", IMPLICIT_CONTROL),
    (f"{SOLVERS}/implicit/solve.py", "            controller.safety,\n", "            0.9,\n", IMPLICIT_CONTROL),
    (f"{SOLVERS}/implicit/solve.py", "            settings.max_step,\n", "            math.inf,\n", IMPLICIT_CONTROL),
    (
        f"{SOLVERS}/implicit/solve.py",
        "clock[Clock.T_END] = fixed[number]",
        "clock[Clock.T_END] = fixed[number].float()",
        f"{IMPLICIT}::test_outputs_are_at_their_times_to_the_last_bit",
    ),
    # ------------------------------------------------------------------ adjoint, events, replay
    (
        f"{SOLVERS}/equations/adjoint.py",
        "_smallest(atol) if adjoint_atol is None else adjoint_atol",
        "_smallest(rtol) if adjoint_atol is None else adjoint_atol",
        f"{ADJOINT}::test_the_backward_solve_has_the_forward_ones_tolerances",
    ),
    (
        f"{SOLVERS}/equations/adjoint.py",
        "_smallest(atol) if adjoint_atol is None else adjoint_atol",
        "_smallest(atol) if adjoint_atol is None else adjoint_rtol or 0.0",
        f"{ADJOINT}::test_each_backward_tolerance_is_its_own",
    ),
    (
        f"{SOLVERS}/equations/adjoint.py",
        "tensor_of(tolerance, torch.float64)",
        "tensor_of(tolerance)",
        f"{ADJOINT}::test_the_backward_solve_has_the_forward_ones_tolerances",
    ),
    (
        f"{SOLVERS}/equations/adjoint.py",
        "            state[1] = ys[i - 1]\n",
        "",
        f"{ADJOINT}::test_y_is_set_to_the_forward_solution_at_each_output",
    ),
    (
        f"{SOLVERS}/equations/adjoint.py",
        'if given != "seminorm":',
        "if True:",
        f"{ADJOINT}::test_seminorm_leaves_the_parameters_out",
    ),
    (
        f"{SOLVERS}/equations/outputs.py",
        "np.not_equal(h, 0.0) & ~reached",
        "np.not_equal(h, 0.0)",
        "tests/test_odeint_gradients.py::test_outputs_where_steps_end_are_counted_once",
    ),
    (f"{SOLVERS}/equations/outputs.py", "-s * s * r * h", "s * s * r * h", f"{OPTIONS}::test_interp_of_fixed_grids"),
    (
        f"{SOLVERS}/equations/packed.py",
        "t = t.clamp(*self.limits)",
        "pass",
        (f"{OPTIONS}::test_jump_t", f"{OPTIONS}::test_jump_t_in_gradients"),
    ),
    (
        f"{SOLVERS}/methods/runge_kutta.py",
        "return t if c == 0.0 else u if c == 1.0 else t + c * (u - t)",
        "return t + c * (u - t)",
        RARE,
    ),
    (
        f"{SOLVERS}/methods/reversible.py",
        "grad_times[n - 1] += of_t + more_of_t",
        "grad_times[n - 1] += of_t",
        "tests/test_reversible.py",
    ),
    (f"{SOLVERS}/equations/sdeint.py", "g.square() + g_u.square()", "2 * g.square()", "tests/test_sdeint.py"),
    (f"{SOLVERS}/equations/sdeint.py", "* (1.0 - 1e-6)", "", "tests/test_sdeint.py"),
    # ------------------------------------------------------------------ grids and methods
    (
        f"{SOLVERS}/sampling/grids.py",
        "self.sigma_min ** np.linspace(0.0, 1.0, steps)",
        "self.sigma_min ** np.linspace(0.0, 1.0, steps + 1)[:-1]",
        "tests/test_grids.py::test_logarithmic_levels_reach_the_least_before_data",
    ),
    (
        f"{SOLVERS}/sampling/grids.py",
        "high + np.linspace(0.0, 1.0, steps) * (low - high)",
        "high + np.linspace(0.0, 1.0, steps + 1)[:-1] * (low - high)",
        "tests/test_grids.py::test_karras_levels",
    ),
    (
        f"{SOLVERS}/methods/diffusion.py",
        "past.each(count, partial(ei.interpolated",
        "past.each(past.count, partial(ei.interpolated",
        f"{DIFFUSION}::test_deis_and_lms_integrate_their_polynomials",
    ),
    (
        f"{SOLVERS}/methods/diffusion.py",
        "weights[1] = weights[1] - 0.5 * moments[2]",
        "weights[1] = weights[1] - moments[2]",
        f"{DIFFUSION}::test_dpmpp_is_the_published_one",
    ),
    (
        f"{SOLVERS}/methods/diffusion.py",
        "second * ei.fresh(first)) * z",
        "ei.fresh(first)) * z",
        "tests/test_diffusion_laws.py",
    ),
    (f"{SOLVERS}/methods/diffusion.py", "2 if count == 1 else 0, count + 1", "0, count + 1", DIFFUSION),
    (f"{SOLVERS}/methods/edm.py", "& (t.ratio <= self.s_tmax)", "", f"{DIFFUSION}::test_edm_is_the_published_one"),
    (f"{SOLVERS}/methods/edm.py", "i / steps, 1.0), self.rho)", "i / steps, 1.0), 1.0)", DIFFUSION),
    (f"{SOLVERS}/methods/noise_levels.py", "if rate else 1.0", "", f"{DIFFUSION}::test_finite_from_end_to_end"),
    (
        f"{SOLVERS}/methods/noise_levels.py",
        "np.abs(h) < 1.0, h, 0.0",
        "np.abs(h) < 1e-9, h, 0.0",
        f"{DIFFUSION}::test_moments_are_the_integrals",
    ),
    (
        f"{SOLVERS}/methods/tableaus.py",
        "error=(-1 / 512, 0.0, 1 / 512),",
        "error=(-1 / 256, 0.0, 1 / 256),",
        "tests/test_tableaus.py::test_error_estimates_are_the_published_ones",
    ),
    (
        f"{SOLVERS}/methods/tableaus.py",
        "        -1 / 66,\n",
        "        1 / 66,\n",
        "tests/test_tableaus.py::test_error_estimates_are_the_published_ones",
    ),
    (
        f"{SOLVERS}/methods/adams.py",
        "past, start = Past(builder, self.order - 1)",
        "past, start = Past(builder, max(1, self.order - 2))",
        "tests/test_sampling.py::test_converges_with_its_order",
    ),
    (
        f"{SOLVERS}/methods/adams.py",
        '4: "heun3"',
        '4: "midpoint"',
        "tests/test_sampling.py::test_converges_with_its_order",
    ),
    # ------------------------------------------------------------------ stochastic solves
    (SDE, "torch.minimum(free, torch.maximum(sigma_t, sigma_u))", "free", STOCHASTIC),
    (SDE, "free = h.abs() * self.scale *", "free = h.abs() *", STOCHASTIC),
    (SDE, "lost = self.scale * renewed", "lost = renewed", RARE),
    (SDE, "- np.sign(end - first) * size", "- size", STOCHASTIC),
    (
        f"{SOLVERS}/methods/sde_coefficients.py",
        "torch.where(at.alpha_t == 0.0, path.coefficients(other).alpha_t, at.alpha_t)",
        "at.alpha_t",
        STOCHASTIC,
    ),
    (f"{SOLVERS}/methods/sde_coefficients.py", "0.5 * self.noise_level**2", "0.5 * self.noise_level", STOCHASTIC),
    # ------------------------------------------------------------------ sampling
    (
        f"{SOLVERS}/sampling/solver.py",
        'if t.dim() == 0 and self.time_shape == "batch" else t',
        "if t.dim() == 0 else t",
        RARE,
    ),
    (
        f"{SOLVERS}/sampling/streaming.py",
        "refill_at = max(1, capacity // 8)",
        "refill_at = capacity",
        "tests/test_streaming.py",
    ),
    # ------------------------------------------------------------------ what runs a step or a program
    (
        "csrc/step_plan/step_plan.cpp",
        "outputs_.front(), k}, {0.0, -1.0, 1.0}",
        "outputs_.front(), k}, {0.0, 0.0, 1.0}",
        BATCHES,
    ),
    ("csrc/step_plan/step_plan.cpp", "a.k0_from = outputs_.front();", "a.k0_from = settings_.k0;", BATCHES),
    (
        "csrc/step_plan/step_plan.cpp",
        "return overlap(k, settings_.y) || overlap(k, settings_.y1) || overlap(k, settings_.k0);",
        "return overlap(k, settings_.y) || overlap(k, settings_.y1);",
        "tests/test_step_plan.py",
    ),
    (
        "csrc/step_plan/step_plan.cpp",
        "  judged_ = false;\n  return combine",
        "  return combine",
        "tests/test_step_plan.py",
    ),
    (
        f"{SOLVERS}/equations/controlled.py",
        "packed.y0.requires_grad or t.requires_grad:",
        "packed.y0.requires_grad:",
        "tests/test_odeint_gradients.py::test_times_alone_have_their_gradient",
    ),
    (
        f"{SOLVERS}/equations/dense.py",
        "(flat >= times[0]) & (flat <= times[-1])",
        "(flat <= times[-1])",
        "tests/test_odeint_gradients.py::test_a_dense_solution_is_of_its_interval",
    ),
    (
        f"{SOLVERS}/equations/controlled.py",
        "packed.part(y, segment.limits)",
        "packed.part(y)",
        "tests/test_odeint_options.py::test_no_solve_asks_for_the_slope_at_a_jump_itself",
    ),
    (
        f"{SOLVERS}/equations/dense.py",
        "packed.part(y, segment.limits)",
        "packed.part(y)",
        "tests/test_odeint_options.py::test_no_solve_asks_for_the_slope_at_a_jump_itself",
    ),
    (
        f"{SOLVERS}/equations/events.py",
        "packed.part(y, segment.limits)",
        "packed.part(y)",
        "tests/test_odeint_options.py::test_no_solve_asks_for_the_slope_at_a_jump_itself",
    ),
    (
        f"{SOLVERS}/equations/controlled.py",
        "            break\n    ys = torch.cat",
        "            pass\n    ys = torch.cat",
        "tests/test_odeint_options.py::test_after_a_part_that_fails_nothing_is_solved",
    ),
    (
        f"{SOLVERS}/programs/ownership.py",
        "output.grad_fn is not None and output._version == 0",
        "output.grad_fn is not None",
        "tests/test_written_inputs.py::test_gradients_of_guidance_whose_network_has_one_buffer",
    ),
    (
        "csrc/step_control/step_control_host.cpp",
        "if (time == clock[at_t * a.rows]) {",
        "if (false) {",
        f"{ADAPTIVE_TESTS}::test_requested_times",
    ),
    (
        f"{SOLVERS}/adaptive/compaction.py",
        "batch.count.index_select(1, keep),",
        "batch.count[:, : keep.shape[0]].clone(),",
        BATCHES,
    ),
    (
        f"{SOLVERS}/adaptive/compaction.py",
        "wanted.index_select(0, keep)",
        "wanted[: keep.shape[0]]",
        f"{BATCHES}::test_compaction_keeps_each_samples_own_output_times",
    ),
    (
        f"{SOLVERS}/programs/captures.py",
        "(v.shape, v.dtype, v.device, v.stride())",
        "(v.shape, v.dtype, v.device)",
        RARE,
    ),
    (
        f"{SOLVERS}/programs/captures.py",
        "yield from (value.__self__, value.__func__)",
        "yield value.__func__",
        "tests/test_captured_memory.py",
    ),
    (
        f"{SOLVERS}/programs/captures.py",
        "yield id(value), tuple(m.training for m in value.modules()), tuple(",
        "yield id(value), tuple(",
        "tests/test_captured_memory.py",
    ),
    (
        f"{SOLVERS}/programs/solve_graph.py",
        "Run(program, wanted.calls(kwargs), self.x, numbers",
        "Run(program, wanted.calls(kwargs), x, numbers",
        "tests/test_captured_memory.py::test_inputs_of_a_call_are_read_at_that_call_alone",
    ),
    (
        f"{SOLVERS}/programs/solve_graph.py",
        "self.coefficients = table.clone()",
        "self.coefficients = table",
        "tests/test_captured_memory.py::test_other_numbers_and_states_change_nothing_that_others_read",
    ),
    (
        f"{SOLVERS}/programs/solve_graph.py",
        "self.arguments = x.clone(), program, StaticArguments(model_kwargs)",
        "self.arguments = x, program, StaticArguments(model_kwargs)",
        "tests/test_captured_memory.py::test_other_numbers_and_states_change_nothing_that_others_read",
    ),
    (
        f"{SOLVERS}/methods/own_steps.py",
        "not np.any(left == 1)",
        "not np.any(left == 0)",
        RARE,
    ),
    (f"{SOLVERS}/methods/own_steps.py", "wide = (left == 1) & ", "wide = ", WAITING),
    (
        f"{SOLVERS}/methods/own_steps.py",
        "& ~moving.any(inner, keepdims=True)",
        "",
        "tests/test_waiting.py::test_a_past_from_before_a_wait_is_no_past_where_others_moved_meanwhile",
    ),
    (f"{SOLVERS}/methods/own_steps.py", "where(waits[i - 1], before[i - 1], 0)", "where(waits[i - 1], 0, 0)", WAITING),
    (f"{SOLVERS}/methods/edm.py", "inside[1:] &= moving", "pass", WAITING),
    (f"{SOLVERS}/methods/edm.py", "np.maximum(OwnSteps(builder.grid).total, 1)", "len(builder.grid) - 1", WAITING),
    (
        f"{SOLVERS}/programs/builder.py",
        "            bases.insert(0, self._state)\n            terms[self._state] = 0.0\n",
        "            pass\n",
        RARE,
    ),
    (
        f"{SOLVERS}/programs/run.py",
        "ends = [*self.segment.step_ends[:-1], len(self.segment.instructions)]",
        "ends = list(self.segment.step_ends)",
        "tests/test_sampling_joined.py::test_checkpoints_keep_what_is_put_out_after_the_last_step",
    ),
    (
        f"{SOLVERS}/sampling/solver.py",
        "            row_offset=row_offset,\n            noise_transform=noise_transform,",
        "            noise_transform=noise_transform,",
        "tests/test_sampling_joined.py::test_shards_of_a_batch_draw_what_the_whole_would",
    ),
    (
        f"{SOLVERS}/programs/plans.py",
        "return key_of(path), prediction, guidance_key(guidance)",
        "return key_of(path), guidance_key(guidance)",
        CACHES,
    ),
    (
        f"{SOLVERS}/programs/plans.py",
        "return key_of(path), prediction, guidance_key(guidance)",
        "return type(path), prediction, guidance_key(guidance)",
        CACHES,
    ),
    (f"{SOLVERS}/programs/plans.py", "return type(guidance), key", "return key", RARE),
    (f"{SOLVERS}/programs/plans.py", "(torch.get_default_dtype(), key)", "key", TIMES),
    (f"{SOLVERS}/programs/expressions.py", "own = t.copy()", "own = t", TIMES),
    (f"{SOLVERS}/programs/expressions.py", "own.setflags(write=False)", "pass", TIMES),
    (f"{SOLVERS}/sampling/solver.py", "t.copy() if isinstance(t, np.ndarray) else t", "t", TIMES),
    (f"{SOLVERS}/sampling/solver.py", "None if times is None else times.t()", "times", TIMES),
    (f"{SOLVERS}/methods/sde_coefficients.py", "self.function(own_times(t))", "self.function(t)", TIMES),
    ("fmkernels/guidance/base.py", "scale(own_times(t))", "scale(tensor_of(t, torch.float64))", TIMES),
    ("fmkernels/paths/schedule.py", "getattr(schedule, name)(own_times(t))", "getattr(schedule, name)(t)", TIMES),
    (
        "fmkernels/likelihood/density.py",
        "self.log_p0(x_0.clone())",
        "self.log_p0(x_0)",
        "tests/test_likelihood_grids.py",
    ),
    (
        "fmkernels/likelihood/density.py",
        "(1.0 - t) * self.t_0 + t * self.t_1",
        "self.t_0 + t * (self.t_1 - self.t_0)",
        DENSITIES,
    ),
    (
        f"{SOLVERS}/programs/plans.py",
        "method if isinstance(method, str) else key_of(method)",
        "method if isinstance(method, str) else type(method)",
        CACHES,
    ),
    (
        f"{SOLVERS}/programs/tables.py",
        "key = (id(program), place(x), x.dtype, dtype, x.shape[0] if shape",
        "key = (id(program), place(x), dtype, x.shape[0] if shape",
        RARE,
    ),
    (
        f"{SOLVERS}/programs/tables.py",
        "key = (id(program), place(x), x.dtype, dtype, x.shape[0] if shape",
        "key = (id(program), place(x), x.dtype, x.shape[0] if shape",
        (CACHES, "tests/test_sampling.py::test_times_that_the_model_sees"),
    ),
    (f"{SOLVERS}/sampling/plan.py", "key = (method, steps, schedule,", "key = (method, schedule,", CACHES),
    (f"{SOLVERS}/sampling/plan.py", "key = (method, steps, schedule,", "key = (method, steps,", CACHES),
    # ------------------------------------------------------------------ chosen beside those that were found
    (f"{SOLVERS}/equations/events.py", "float(atol.min())", "float(atol.max())", EVENTS),
    (f"{SOLVERS}/equations/options.py", "replace(found, order=min(max(order, least), MAX_ORDER))", "found", RARE),
    (
        f"{SOLVERS}/equations/options.py",
        "sorted((beside(start, end), beside(end, start)))",
        "sorted((beside(start, end), end))",
        OPTIONS,
    ),
    (
        f"{SOLVERS}/methods/step_density.py",
        "count.clamp(min=1).to(z.dtype)",
        "z[0].numel()",
        RARE,
    ),
    (
        f"{SOLVERS}/methods/noise_transforms.py",
        "(points - 1).clamp(min=0)",
        "points",
        "tests/test_step_log_prob.py",
    ),
    (KEEPER, "    batch.count.zero_()\n", "", KEPT),
    (KEEPER, "    batch.y.copy_(y0)\n", "", KEPT),
    (f"{SOLVERS}/programs/tables.py", "return self._table._version == self._version", "return True", CACHES),
]
