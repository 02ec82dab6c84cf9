"""Triton kernels. They import torch and triton alone, and check nothing: hwprune.ops does."""
