"""The module of an entry point that takes its process down when it is imported."""

import os

os.abort()
