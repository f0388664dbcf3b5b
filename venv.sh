# Sourced by loop.sh, fig4.sh and test.sh: sets PYTHON to an interpreter that has requirements.txt, making .venv on first
# use. With GIVEN, the variables that a script takes from the environment, it also exports AGAIN: what a stopped stage
# tells the user to give again.
if [ -n "${GIVEN:-}" ]; then
  AGAIN=
  for NAME in $GIVEN; do
    [ -z "${!NAME:-}" ] || AGAIN+="$NAME=$(printf %q "${!NAME}") "
  done
  export AGAIN+="bash $(basename "$0")$(printf ' %q' "$@")"
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "installing requirements.txt into .venv (once, about a minute)"
    python3 -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt &&
      cp requirements.txt .venv/installed.txt || # last, so that an interrupted installation is made again
      { echo "error: requirements.txt could not be installed into .venv: see above, then give the command again" >&2 && return 1; }
  fi
fi
command -v "$PYTHON" >/dev/null || { echo "error: PYTHON=$PYTHON is no interpreter here: name one that has requirements.txt, or leave it out" >&2 && return 2; }
PATH=$(cd "$(dirname "$PYTHON")" 2>/dev/null && pwd):$PATH # for SFT_LAUNCH="torchrun ..."
# torch's CPU threads wait for each other asleep, not spinning: with one core taken by something else, spinning makes two
# threads ten times slower (results/experiments.md).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
