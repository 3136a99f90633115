"""CPython's own tests take minutes, and are not collected unless PORTSHM_COMPAT is set, as tox -e compat-py313 does."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("PORTSHM_COMPAT") else ["test_*.py"]
