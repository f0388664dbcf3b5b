#!/usr/bin/env bash
# All the tests and the style check, from nothing: makes .venv if need be. Arguments go to pytest, e.g. -k gae -n 0.
set -euo pipefail
cd "$(dirname "$0")"
source venv.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -n 2 --dist worksteal "$@"
