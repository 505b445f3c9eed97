"""Log-densities of flows and of the steps of SDEs."""

from .density import LogProb, bits_per_dim, log_prob, sample_with_log_prob, standard_normal

__all__ = ["LogProb", "bits_per_dim", "log_prob", "sample_with_log_prob", "standard_normal"]
