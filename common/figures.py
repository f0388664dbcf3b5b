"""matplotlib for files alone."""

import os
from types import ModuleType


def pyplot() -> ModuleType:
    """Return matplotlib.pyplot, which draws without a screen whatever MPLBACKEND is. Importing it takes a second."""
    # A notebook's own back end is not installed here, and matplotlib refuses its name.
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
