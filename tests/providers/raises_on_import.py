"""The module of an entry point whose library misses a file."""

raise ImportError("libcudart.so.12: cannot open shared object file")
