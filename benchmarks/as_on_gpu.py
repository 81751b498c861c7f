"""A pytest plugin for --collect-only: tests are collected as if torch saw a CUDA device."""

import torch

torch.cuda.is_available = lambda: True
