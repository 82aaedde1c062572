"""Settings of lz-compile, in the manner of PyTorch's own config modules.

Set them for the process (``lz_compile.config.strict = True``), for a block
(``with lz_compile.config.patch(strict=True)``) or for one compile
(``torch.compile(model, backend="layerzero", options={"strict": True})``).
"""

import sys
from typing import TYPE_CHECKING, Any

# Raise where lz-compile would otherwise log a warning and leave the region, or the graph, to Inductor.
strict: bool = False

# Kernels that may not be used: globs over kernel names, such as ["triton.*"].
disable: list[str] = []

# Kernels to be tried before the others, in this order: globs over kernel names.
prefer: list[str] = []

# Region kinds to look for; an empty list leaves every graph to Inductor.
kinds: list[str] = ["attention", "rope_table"]

if TYPE_CHECKING:

    def patch(*args: Any, **kwargs: Any) -> Any:
        """Context manager and decorator: settings for a block."""

    def get_config_copy() -> dict[str, Any]:
        """All settings by name."""


def _install() -> None:
    from torch.utils._config_module import install_config_module

    install_config_module(sys.modules[__name__])


_install()
