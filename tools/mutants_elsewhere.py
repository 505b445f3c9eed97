"""Bugs outside of the solvers for tools/mutants.py; see mutants_of_solvers.py."""

from __future__ import annotations

LINEAR = "tests/test_guidance_linear.py"
NONLINEAR = "tests/test_guidance_nonlinear.py"
ROWS = "tests/test_guidance_rows.py"
WAITING = "tests/test_waiting.py"
PATHS_TESTS = "tests/test_paths.py"
TARGETS = "tests/test_targets.py"
WEIGHTS = "tests/test_weightings_times.py"
OPS_CASES = "tests/test_ops.py::test_case"
NOISE = "tests/test_noise.py"

CACHES = "tests/test_caches.py"
RARE = "tests/test_rare_branches.py"
BATCHES = "tests/test_batch.py"
SCHEDULES = "tests/test_schedules.py"
VALUES = "tests/test_path_values.py"
ATTACK = "tests/test_found_by_attack.py"
ARGUMENTS = "tests/test_wrong_arguments.py"

MUTANTS: list[tuple[str, str, str, str | tuple[str, ...]]] = [
    # ------------------------------------------------------------------ guidance
    ("fmkernels/guidance/base.py", "(t >= low - _EDGE * max(1.0, abs(low)))", "(t >= low)", ROWS),
    ("fmkernels/guidance/base.py", "(t <= high + _EDGE * max(1.0, abs(high)))", "(t <= high)", ROWS),
    ("fmkernels/guidance/base.py", "_EDGE = 1e-6", "_EDGE = 2e-2", ROWS),
    ("fmkernels/guidance/cfg.py", "(square + 1e-8)", "(square + 1e-2)", LINEAR),
    ("fmkernels/guidance/cfg.py", "return rows - mean, mean.flatten()", "return rows, mean.flatten()", ROWS),
    ("fmkernels/guidance/cfg.py", "(torch.finfo(v.dtype).eps * v_mean).square()", "-1.0", ROWS),
    ("fmkernels/guidance/cfg.py", "torch.where(ratio > 0.0, ratio, 1.0)", "ratio", ROWS),
    ("fmkernels/guidance/cfg.py", "guided: Any = isinstance(w, float) or w != 1.0", "guided: Any = True", ROWS),
    ("fmkernels/guidance/cfg.py", "np.logical_and(guided, np.logical_not(added))", "np.logical_not(added)", ROWS),
    (
        "fmkernels/guidance/cfg.py",
        "step.number, last, current, added | adds)",
        "step.number, last, current, True)",
        ROWS,
    ),
    ("fmkernels/guidance/cfg.py", "adds = adds & ~builder.still", "pass", WAITING),
    ("fmkernels/guidance/cfg.py", "builder.own_number, self.zero_steps)", "builder.own_number, 1)", LINEAR),
    ("fmkernels/guidance/cfg.py", "along = (1.0 - eta) * product", "along = product", NONLINEAR),
    ("fmkernels/guidance/cfg.py", "d_square.clamp(min=threshold**2)", "d_square.clamp(min=threshold)", NONLINEAR),
    ("fmkernels/guidance/cfg.py", "before if number == builder.step.number else current", "current", NONLINEAR),
    ("fmkernels/guidance/cfg.py", "noise = c * beyond + u * (1.0 - beyond)", "noise = u", NONLINEAR),
    ("fmkernels/guidance/cfg.py", "self.interval, outside=0.0)", "self.interval)", NONLINEAR),
    ("fmkernels/guidance/cfg.py", "self.fraction * (builder.step.u - t)", "(builder.step.u - t)", NONLINEAR),
    (
        "fmkernels/guidance/linear.py",
        'overridden(model_kwargs, self.weak_kwargs, argument="weak_kwargs")',
        "model_kwargs",
        LINEAR,
    ),
    ("fmkernels/guidance/linear.py", "self.interval, outside=0.0)", "self.interval)", LINEAR),
    ("fmkernels/guidance/linear.py", "torch.where(alpha == 0.0, torch.zeros_like(slope), slope)", "slope", LINEAR),
    # ------------------------------------------------------------------ likelihood
    (
        "fmkernels/likelihood/density.py",
        "else -solution.integral",
        "else solution.integral",
        "tests/test_likelihood.py",
    ),
    (
        "fmkernels/likelihood/density.py",
        "row_offset=self.row_offset",
        "row_offset=0",
        "tests/test_likelihood_adaptive.py",
    ),
    ("fmkernels/likelihood/density.py", "+ math.log2(scale)", "- math.log2(scale)", "tests/test_likelihood.py"),
    (
        "fmkernels/likelihood/log_det.py",
        "a * math.prod(x.shape[1:]) + b * div",
        "a + b * div",
        "tests/test_likelihood.py",
    ),
    ("fmkernels/likelihood/divergence.py", "return total / count", "return total", "tests/test_divergence.py"),
    ("fmkernels/likelihood/divergence.py", "(p % _BITS)", "0", "tests/test_divergence.py"),
    (
        "fmkernels/likelihood/divergence.py",
        "noise.stream + evaluation * streams_of(self.probes, self.distribution)",
        "noise.stream + evaluation",
        "tests/test_divergence.py::test_evaluations_with_fresh_probes_share_none",
    ),
    (
        "fmkernels/likelihood/step_log_prob.py",
        "a, b = a + b * a_v, b * b_v",
        "a, b = a + a_v, b * b_v",
        "tests/test_step_log_prob.py",
    ),
    # ------------------------------------------------------------------ paths, targets, losses, times
    ("fmkernels/paths/affine.py", "(1.0 - t) + self.sigma_min * t", "(1.0 - t) + self.sigma_min", PATHS_TESTS),
    ("fmkernels/paths/affine.py", "return self.sigma_min - 1.0", "return -1.0", PATHS_TESTS),
    ("fmkernels/paths/affine.py", "/ (1.0 + ratio - self.sigma_min)", "/ (1.0 + ratio)", PATHS_TESTS),
    ("fmkernels/paths/bridges.py", "(1.0 - 2.0 * t) / root", "(1.0 - t) / root", PATHS_TESTS),
    ("fmkernels/paths/targets.py", "d_1 * alpha + d_0 * sigma", "d_1 * alpha - d_0 * sigma", (PATHS_TESTS, TARGETS)),
    ("fmkernels/paths/targets.py", "result = result.clamp(-limit, limit)", "pass", (PATHS_TESTS, TARGETS)),
    (
        "fmkernels/paths/targets.py",
        "torch.promote_types(torch.float32 if half else prediction.dtype, x_t.dtype)",
        "prediction.dtype",
        (PATHS_TESTS, TARGETS),
    ),
    ("fmkernels/paths/batch.py", "((t >= 0) & (t <= 1)).all()", "(t <= 1).all()", ARGUMENTS),
    (
        "fmkernels/paths/batch.py",
        "Noise._of(operand.seed, operand.stream, operand.row_offset + first)",
        "Noise._of(operand.seed, operand.stream, operand.row_offset)",
        BATCHES,
    ),
    (
        "fmkernels/paths/batch.py",
        "source, TIME_STREAM, row_offset, torch.float32",
        "source, 2, 0, torch.float32",
        BATCHES,
    ),
    ("fmkernels/paths/batch.py", "UNIFORM, source, TIME_STREAM", "UNIFORM, source, X_0_STREAM", BATCHES),
    ("fmkernels/paths/fused.py", "if row_offset else 0", "if row_offset < 0 else 0", "tests/test_fused_schedules.py"),
    ("fmkernels/paths/fused.py", " and self.kernel == kernel", "", "tests/test_fused_schedules.py"),
    ("fmkernels/paths/batch.py", "elif not drawn and (seed is not None", "elif not drawn and (False", ARGUMENTS),
    (
        "fmkernels/paths/batch.py",
        "if self.t.dim() == 0 else self.t[index]",
        "if self.t.dim() != 1 else self.t[index]",
        BATCHES,
    ),
    ("fmkernels/paths/derivatives.py", "wanted and _has_other_leaf(value, leaf)", "False", SCHEDULES),
    ("fmkernels/paths/derivatives.py", "if (_is_of_numbers(owner) and", "if (True and", ATTACK),
    ("fmkernels/paths/derivatives.py", "compiling else _inside(t):", "compiling else True:", SCHEDULES),
    ("fmkernels/paths/schedule.py", "near.abs().clamp(max=SMALL)", "SMALL", TARGETS),
    ("fmkernels/random.py", "seed.detach().clone()", "seed", BATCHES),
    ("fmkernels/paths/batch.py", "source = source.detach().clone()", "pass", BATCHES),
    (
        "fmkernels/ops/regression_loss/autograd.py",
        "return kind in _BENT and",
        "return False and",
        "tests/test_penalties.py",
    ),
    (
        "fmkernels/ops/regression_loss/autograd.py",
        "if mask is not None and not by_element:",
        "if False:",
        "tests/test_loss_gradients.py",
    ),
    (
        "fmkernels/ops/regression_loss/autograd.py",
        "_native.on_host(grad_output) and math.isfinite(grad_output.sum().item())",
        "_native.on_host(grad_output)",
        "tests/test_loss_gradients.py",
    ),
    (
        "fmkernels/paths/derivatives.py",
        "slope is not None and bool((slope != 0).any())",
        "slope is not None",
        SCHEDULES,
    ),
    ("fmkernels/paths/derivatives.py", "low = x < SMALL * SMALL", "low = x < SMALL", SCHEDULES),
    ("fmkernels/paths/derivatives.py", "SMALL ** (exponent - 1.0) * (x", "SMALL**exponent * (x", SCHEDULES),
    ("fmkernels/paths/schedule.py", 'or base.__dict__.get("__slots__")', "", VALUES),
    ("fmkernels/paths/schedule.py", "(name, type(values[name]), values[name])", "(name, values[name])", VALUES),
    ("fmkernels/paths/targets.py", "            times = times.double()\n", "            pass\n", TARGETS),
    (
        "fmkernels/losses.py",
        "place.clamp_(max=self.bins - 1)",
        "place.clamp_(max=self.bins)",
        "tests/test_loss_bins.py",
    ),
    ("fmkernels/losses.py", "return self._held()[0].clone()", "return self._held()[0]", "tests/test_loss_bins.py"),
    ("fmkernels/losses.py", 'if z is not None and at(path, "gamma", times) is None:', "if False:", ARGUMENTS),
    (
        "fmkernels/weightings.py",
        "    _check(path, t)\n    t = promoted",
        "    t = promoted",
        RARE,
    ),
    ("fmkernels/times.py", "first + count > whole", "first > whole", WEIGHTS),
    ("fmkernels/times.py", "[first : first + count]", "[:count]", BATCHES),
    ("fmkernels/times.py", "d = (a + 1.0 if a < 1.0 else a) - 1.0 / 3.0", "d = a", WEIGHTS),
    ("fmkernels/times.py", "value + boost / a if a < 1.0 else value", "value", WEIGHTS),
    ("fmkernels/times.py", "(log_u < 0.5 * z.square() + d", "(log_u < z.square() + d", WEIGHTS),
    ("fmkernels/weightings.py", "1.0 - 2.0 * sigma + 2.0", "1.0 - 2.0 * sigma + 1.0", WEIGHTS),
    ("fmkernels/weightings.py", "(1.0 - t).clamp(min=SMALL)", "(1.0 - t).clamp(min=1e-8)", WEIGHTS),
    (
        "fmkernels/weightings.py",
        'divisor(path, "sigma", t)',
        'at(path, "sigma", t)',
        WEIGHTS,
    ),
    ("fmkernels/weightings.py", "math.exp(self.bias)", "math.exp(-self.bias)", WEIGHTS),
    (
        "fmkernels/losses.py",
        "noise_dtype=x_1.dtype",
        "noise_dtype=pred.dtype",
        BATCHES,
    ),
    (
        "fmkernels/times.py",
        "(self.low + (self.high - self.low) * u).clamp(*self._ends)",
        "self.low + (self.high - self.low) * u",
        WEIGHTS,
    ),
    ("fmkernels/times.py", "        return t.clamp(*self._ends)", "        return t", WEIGHTS),
    ("fmkernels/times.py", "base_shift + slope * (seq_len - base_seq_len)", "base_shift + slope * seq_len", WEIGHTS),
    ("fmkernels/times.py", "return self.shift * t / (1.0 - t + self.shift * t)", "return self.shift * t", WEIGHTS),
    ("fmkernels/random.py", "seed - 2**64 if seed >= 2**63 else seed", "seed - 2**64 if seed > 2**63 else seed", NOISE),
    ("fmkernels/random.py", "torch.float16: 11, torch.bfloat16: 8", "torch.float16: 12, torch.bfloat16: 8", NOISE),
    (
        "fmkernels/random.py",
        "offset = row_offset * math.prod(shape[1:])",
        "offset = row_offset * math.prod(shape)",
        NOISE,
    ),
    # ------------------------------------------------------------------ operations
    (
        "fmkernels/ops/combine/reference.py",
        "torch.maximum(first.abs(), y.abs())",
        "first.abs()",
        (OPS_CASES, "tests/test_ops_random.py::test_combine"),
    ),
    (
        "fmkernels/ops/regression_loss/reference.py",
        "torch.where(kept, w, 0.0)",
        "w",
        RARE,
    ),
    (
        "fmkernels/ops/row_dots/op.py",
        "shift = factors.pop(ONES, None)",
        "factors.pop(ONES, None); shift = None",
        "tests/test_row_dots.py",
    ),
    (
        "csrc/regression_loss/penalty.h",
        "d < T(0) ? -delta : (d > T(0) ? delta : d)",
        "d < T(0) ? -delta : delta",
        RARE,
    ),
    (
        "csrc/regression_loss/regression_loss_cpu.cpp",
        "for (int64_t k = j; k < j + m; ++k) keep[k] = kept;",
        "for (int64_t k = j; k < j + (m > 40 ? m - 1 : m); ++k) keep[k] = kept;",
        ("tests/test_ops_random.py::test_regression_loss", OPS_CASES),
    ),
    (
        "csrc/regression_loss/regression_loss_cpu.cpp",
        "a.mask[row / (a.mask_elements / a.inner)]",
        "a.mask[row]",
        ("tests/test_ops_random.py::test_regression_loss", OPS_CASES),
    ),
    (
        "csrc/row_dots/row_dots_cpu.cpp",
        "for (int64_t l = 0; j < inner; ++l, ++j)",
        "for (int64_t l = 0; j + 1 < inner; ++l, ++j)",
        "tests/test_row_dots.py::test_values",
    ),
    (
        "csrc/random/random_cpu.cpp",
        "a.dtype == Dtype::f16 ? 11 : 8",
        "a.dtype == Dtype::f16 ? 12 : 8",
        f"{NOISE}::test_uniforms",
    ),
    ("csrc/common/philox.h", "stream >> 32", "stream >> 31", f"{NOISE}::test_known_answers"),
    # ------------------------------------------------------------------ leaves
    (
        "fmkernels/_memory.py",
        'torch.empty_like(data, device="meta").stride()',
        'torch.empty(data.shape, device="meta").stride()',
        "tests/test_ops.py::test_large_outputs_keep_their_memory_format",
    ),
    (
        "fmkernels/_checks.py",
        "isinstance(value, bool) or not isinstance(value, int)",
        "not isinstance(value, int)",
        RARE,
    ),
    (
        "csrc/common/pool.cpp",
        "block.bytes - rounded <= rounded / 8",
        "true",
        "tests/test_ops.py::test_a_block_of_the_pool_wastes_little",
    ),
    (
        "csrc/common/pool.cpp",
        "p.cached -= block.bytes;",
        "",
        "tests/test_ops.py::test_large_outputs_are_pooled_and_streamed_and_right",
    ),
    # ------------------------------------------------------------------ the cache and its keys
    ("fmkernels/_keys.py", "else (float, str(value))", "else (float, value)", CACHES),
    ("fmkernels/_keys.py", "bool: lambda value: (bool, value)", "bool: lambda value: (int, value)", CACHES),
    ("fmkernels/_keys.py", "value.dtype.str, value.shape, value.tobytes()", "value.dtype.str, value.tobytes()", CACHES),
    ("fmkernels/_keys.py", "tuple(value.shape), flat.tobytes()", "flat.tobytes()", CACHES),
    ("fmkernels/_keys.py", "if value.__closure__ or value.__defaults__ or", "if value.__defaults__ or", CACHES),
    ("fmkernels/_keys.py", "value.__defaults__ or value.__kwdefaults__", "value.__kwdefaults__", CACHES),
    ("fmkernels/_keys.py", "if not is_ours(cls) or isinstance(value, type)", "if isinstance(value, type)", CACHES),
    ("fmkernels/_cache.py", "        if total > self.budget.limit:\n            return entry\n", "", CACHES),
    ("fmkernels/_cache.py", "after_in_child=_renew", "after_in_child=lambda: _LOCK.release()", CACHES),
    ("fmkernels/_cache.py", "with torch.inference_mode(False), torch.no_grad(),", "with torch.no_grad(),", CACHES),
    (
        "fmkernels/_cache.py",
        "if entry is not None and entry.busy.acquire(blocking=False):",
        "if entry is not None:",
        CACHES,
    ),
    ("fmkernels/_cache.py", "        entry.used = _tick()\n", "", RARE),
    ("fmkernels/_cache.py", "if self.budget.bytes > self.budget.limit:", "if False:", CACHES),
    ("fmkernels/_cache.py", "self.budget.bytes -= entry.bytes", "pass", CACHES),
    ("fmkernels/_keys.py", "and not value.requires_grad", "", CACHES),
    ("fmkernels/guidance/base.py", "if not is_ours(type(self)):", "if False:", RARE),
    ("fmkernels/paths/derivatives.py", "math.isfinite(end.sum().item())", "True", SCHEDULES),
    ("fmkernels/paths/derivatives.py", "slope.detach().sum().item() != 0.0", "True", SCHEDULES),
]
