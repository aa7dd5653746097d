"""The paper's experiments on MNIST: `jlebm reproduce mnist`."""
