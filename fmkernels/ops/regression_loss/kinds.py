"""Penalties rho(d) of a residual d = pred - target; the codes of csrc/regression_loss/penalty.h."""

KINDS = {"squared": 0, "huber": 1, "pseudo_huber": 2, "l1": 3}
