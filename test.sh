#!/usr/bin/env bash
# All tests but the slow ones, and the style check. Makes .venv on first use. Arguments go to pytest, e.g. -k gae -n 0.
set -euo pipefail
cd "$(dirname "$0")"
REQUIREMENTS="requirements.txt requirements-dev.txt" source tools/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -n 2 --dist worksteal "$@"
