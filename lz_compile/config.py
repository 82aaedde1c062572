"""Settings of lz-compile, in the manner of PyTorch's own config modules.

Set them for the process (``lz_compile.config.strict = True``), for a block
(``with lz_compile.config.patch(strict=True)``) or for one compile
(``torch.compile(model, backend="layerzero", options={"strict": True})``).  ``print(lz_compile.config)`` and the command
``lz-compile config`` show them all.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

# Raise where lz-compile would otherwise log a warning and leave the region, or the graph, to Inductor.
strict: bool = False

# Kernels that may not be used: globs over kernel names, such as ["triton.*"].
disable: list[str] = []

# Where one of these kernels can run a region, no other competes: globs over kernel names, earlier ones first.
prefer: list[str] = []

# "auto" qualifies and times kernels that are not in the performance database yet, "cached" uses what is there, "off"
# estimates every kernel from shapes.  LZ_COMPILE_MEASURE sets it for a process.
measure: str = os.environ.get("LZ_COMPILE_MEASURE", "auto")

# Seconds that measuring may take for one graph, compilation of kernels included.
measure_budget: float = 10.0

# A policy for this compile: a YAML file or its text (see lz_compile.policy).
policy: str = ""

# Compute only the rows that are read: behind `hidden_states[:, -1:]` the last layer runs on one token.
trim_rows: bool = True

# Attend to latents where keys and values are a linear map of them (DeepSeek's attention) and queries are few, instead
# of expanding the whole cache for every head.
absorb_latents: bool = True

# Make q, k and v (and gate and up) one product over one packed weight, where that is faster: the parameters become
# views of one storage.
pack_weights: bool = True

# On which device types.  On a CPU one product is no faster than several, and finding that out takes compiling.
pack_devices: list[str] = ["cuda"]

# Let a top-p filter on CUDA keep one token more or less than eager's where only the rounding of its sums decides.
# Needed for a fast one inside CUDA graphs: without it such rows are found and run as in eager, which asks the device.
rounded_filters: bool = False

# Write a folder for each compiled graph into this one: its graphs as Python that runs, the plan, and a comparison of
# backends (see lz_compile.dump).  LZ_COMPILE_DUMP sets it for a process.
dump: str = os.environ.get("LZ_COMPILE_DUMP", "")

# Store parameters and buffers with a dump; they are made up otherwise.
dump_weights: bool = False

# Region kinds to look for, where some kernel runs on the graph's device; an empty list leaves every graph to Inductor.
# Not among them unless asked for: "rolled_window", by which a full sliding cache on CUDA moves its rows in place.
kinds: list[str] = ["attention", "rope_table", "rms_norm", "glu", "rope", "moe", "sampling", "projections"]

# Values of settings that take one of a few words.
_WORDS = {"measure": ("auto", "cached", "off")}

if TYPE_CHECKING:

    def patch(*args: Any, **kwargs: Any) -> Any:
        """Context manager and decorator: settings for a block."""

    def get_config_copy() -> dict[str, Any]:
        """All settings by name."""


def _install() -> None:
    from torch.utils._config_module import install_config_module

    module = sys.modules[__name__]
    install_config_module(module)
    # The class is made for this module alone.
    type(module).__repr__ = _as_text  # type: ignore[method-assign]


def _as_text(module: Any) -> str:
    from lz_compile.settings import as_text

    return as_text()


_install()
