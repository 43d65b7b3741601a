"""Arrow's compute functions, which are made when it is imported and so are unknown to a type checker."""

from __future__ import annotations

import importlib
from typing import Any

pc: Any = importlib.import_module("pyarrow.compute")
