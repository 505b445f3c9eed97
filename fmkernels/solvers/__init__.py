"""Solvers: tableaus as data, fixed-grid programs of linear updates, per-sample adaptive steps."""
