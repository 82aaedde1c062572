"""lz-compile: ``torch.compile(model, backend="layerzero")``.

The backend is found by name; importing this package is needed only to ask it questions: :func:`explain`,
:func:`reports` and :mod:`lz_compile.config`.
"""

from lz_compile import config
from lz_compile.explanation import explain
from lz_compile.options import OptionError
from lz_compile.policy import PolicyError, overrule
from lz_compile.report import GraphReport, RegionReport, Report, reports

__version__ = "0.1.0"

__all__ = [
    "GraphReport",
    "OptionError",
    "PolicyError",
    "RegionReport",
    "Report",
    "config",
    "explain",
    "overrule",
    "reports",
]
