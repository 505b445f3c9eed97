"""The benchmark suite: ours side by side with plain PyTorch, torch.compile, the peers and the copy floor.

``python -m benchmarks`` measures and appends JSON lines to results/<machine>/; ``python -m benchmarks
render`` makes plots and tables from them. A new case is an entry in an operation's cases.py (tag "bench"), a
new implementation an entry in families.py or peers.py.
"""
