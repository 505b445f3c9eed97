"""flow_matching's affine paths, schedulers and ODE solver (Lipman et al. 2024, "Flow matching guide and code").

Written from its documentation. t = 0 is the source, t = 1 the data.
"""

__all__: list[str] = []
