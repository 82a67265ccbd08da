"""Which versions of transformers the families were tested with."""

from __future__ import annotations

import sys
import warnings

from torch import nn

TESTED = ("5.23", "4.57")


def warn_of_untested(model: nn.Module, stacklevel: int) -> None:
    """Warn if a model is of a version of transformers that was not tested: routers differ from one to the next.

    Args:
        model: any model; nothing is imported for it.
        stacklevel: of the caller.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(isinstance(module, modeling.PreTrainedModel) for module in model.modules()):
        return
    version = sys.modules["transformers"].__version__
    if not version.startswith(tuple(f"{tested}." for tested in TESTED)):
        ranges = " and ".join(f"{tested}.x" for tested in TESTED)
        warnings.warn(
            f"transformers {version} is not a version whose routers were tested ({ranges}): compare metrics() with "
            "what you know of the routing",
            stacklevel=stacklevel + 1,
        )
