"""Test settings: one thread a process; Triton's interpreter stands in for a missing GPU."""

import os

# Tiny models: a second thread costs more than it helps, and pytest runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
