# Sourced by loop.sh, test.sh and the scripts of tools/: sets PYTHON to an interpreter that has the packages of REQUIREMENTS
# (default: requirements.txt), and makes .venv on first use. If the script names its environment variables in VARIABLES,
# RESUME_COMMAND becomes the command that a stopped stage tells the user to rerun.
if [ -n "${VARIABLES:-}" ]; then
  RESUME_COMMAND=
  for NAME in $VARIABLES; do
    [ -z "${!NAME:-}" ] || RESUME_COMMAND+="$NAME=$(printf %q "${!NAME}") "
  done
  RESUME_COMMAND+="bash $(printf '%q ' "$0" "$@")"
  export RESUME_COMMAND=${RESUME_COMMAND% }
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  for FILE in ${REQUIREMENTS:-requirements.txt}; do
    if ! cmp -s "$FILE" ".venv/$FILE"; then
      echo "installing $FILE into .venv (once, about a minute)"
      python3 -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check -r "$FILE" &&
        cp "$FILE" ".venv/$FILE" || # last, so that an interrupted installation is repeated
        { echo "error: $FILE could not be installed into .venv: see above, then rerun the command" >&2 && exit 1; }
    fi
  done
fi
command -v "$PYTHON" >/dev/null ||
  { echo "error: PYTHON=$PYTHON is not an interpreter: name one that has requirements.txt, or leave it out" >&2 && exit 2; }
PATH=$(cd "$(dirname "$PYTHON")" 2>/dev/null && pwd):$PATH # for SFT_LAUNCH="torchrun ..."
# torch's CPU threads sleep while they wait for each other. Spinning makes two threads ten times slower while
# other processes take the cores (results/experiments.md).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
