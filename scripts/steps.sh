# Functions of scripts/check and scripts/quickstart, which source this file: steps with their times, and environments.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "$0: needs Python 3.11 or newer, found: $("$python" -V 2>&1 || true)" >&2
  echo "use another one: PYTHON=python3.12 $0" >&2
  exit 1
fi

# step TITLE COMMAND...: run a command (or function) with a title before it and the time that it took after it.
step() {
  current_step=$1
  local start=$SECONDS
  printf '\n== %s\n' "$1" >&2
  "${@:2}"
  printf '== done in %s\n' "$(duration $((SECONDS - start)))" >&2
}

duration() { if (($1 < 60)); then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi; }

# Name the step that failed or was interrupted, and stop the progress lines of pip_install.
at_exit() {
  local code=$?
  [ -z "${progress_pid:-}" ] || kill "$progress_pid" 2>/dev/null || true
  if ((code == 0)); then
    printf '\n== all steps done in %s\n' "$(duration $SECONDS)" >&2
  else
    printf '\n== failed: %s (exit code %d)\n' "${current_step:-start}" "$code" >&2
  fi
}
trap at_exit EXIT

# pip_install VENV ARGUMENTS...: a slow index or a large package gets a line every 30 seconds, and a failure gets all
# of pip's output. Warnings about an index are not shown otherwise.
pip_install() {
  local venv=$1 log=$1/pip.log
  : >"$log"
  progress "$log" &
  progress_pid=$!
  local code=0
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${@:2}" >"$log" 2>&1 || code=$?
  kill "$progress_pid" 2>/dev/null || true
  wait "$progress_pid" 2>/dev/null || true
  progress_pid=
  ((code == 0)) || cat "$log" >&2
  return $code
}

progress() {
  trap 'kill "${sleep_pid:-}" 2>/dev/null; exit 0' TERM
  local start=$SECONDS
  while kill -0 $$ 2>/dev/null; do
    sleep 30 &
    sleep_pid=$!
    wait "$sleep_pid"
    printf '   %s: %s\n' "$(duration $((SECONDS - start)))" \
      "$({ grep -E '^ *(Collecting|Downloading|Building|Installing)' "$1" || echo 'pip started'; } | tail -n 1 | cut -c 1-100)" >&2
  done
}

# make_environment VENV CONSTRAINTS EXTRA: install the project with an extra once, and again if its dependencies change.
make_environment() {
  local stamp=$1/.installed-$3 dependencies
  dependencies=$(cat pyproject.toml "$2" | cksum)
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$dependencies" ]; then return; fi
  [ -x "$1/bin/python" ] || "$python" -m venv "$1"
  pip_install "$1" --no-compile --constraint "$2" --editable ".[$3]"
  # On all cores, and without the packages' own tests: pip takes twice as long. Some packages have files for other
  # Python versions, which do not compile: that is no failure, and pip ignores it, too.
  "$1/bin/python" -m compileall -q -j 0 -x '/(tests?|testing)/' "$1/lib" >/dev/null 2>&1 || true
  echo "$dependencies" >"$stamp"
}
