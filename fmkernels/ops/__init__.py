"""The operations: a folder each, with a public function, a plain PyTorch reference, and kernels."""
