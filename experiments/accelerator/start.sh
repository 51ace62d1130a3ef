#!/usr/bin/env bash
# Train on a bare machine without a network, in the root of the checkout:
#
#   bash experiments/accelerator/start.sh FOLDER [FLAGS OF experiments.accelerator]
#
# FOLDER holds the wheels of wheels.txt in FOLDER/wheels and, unless the preset is a reduced one, the parts of
# CIFAR-10 as `python -m experiments.accelerator.parcels data` packs them.
#
#   QT_JAX_SITE  folder in which missing packages are installed; a temporary one by default
#   QT_JAX_DATA  data cache; FOLDER/data by default
#   OUT          folder that gets the results as `parcels send` packs them, also if training stops or fails
#
# The exit status is that of the training; 2 if something is missing before it.
set -euo pipefail

complain() {
  echo "start.sh: $*" >&2
  exit 2
}

(($# > 0)) || complain "name the folder of wheels and data first: start.sh FOLDER [FLAGS]"
folder=$1
shift
[[ -d $folder ]] || complain "$folder is not there: name the folder of wheels and data first"
[[ -f experiments/accelerator/start.sh ]] || complain "run this in the root of the checkout"
python=$(command -v python3) || complain "python3 is not on the PATH: install Python 3.11 or later"

preset=quarter-hour runs=runs before=
for word in "$@"; do
  case $before in
    --preset) preset=$word ;;
    --runs) runs=$word ;;
  esac
  case $word in
    --preset=*) preset=${word#*=} ;;
    --runs=*) runs=${word#*=} ;;
  esac
  before=$word
done

temporary=
training=
status=0

# shellcheck disable=SC2329  # the trap below calls it
leave() {
  status=$?
  trap - EXIT
  if [[ -n $training && -n ${OUT:-} ]]; then
    "$python" -m experiments.accelerator.parcels send --out "$OUT" --preset "$preset" --runs "$runs" ||
      echo "start.sh: no results were packed" >&2
  fi
  [[ -z $temporary ]] || rm -rf "$temporary"
  exit "$status"
}
trap leave EXIT

[[ -n ${QT_JAX_SITE:-} ]] || temporary=$(mktemp -d)
site=${QT_JAX_SITE:-$temporary}
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
export QT_JAX_DATA=${QT_JAX_DATA:-$folder/data}

shopt -s nullglob
missing=$("$python" - "$folder"/wheels/*.whl <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for wheel in sys.argv[1:]:
    try:
        version(Path(wheel).name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
END
)
if [[ -n $missing ]]; then
  mapfile -t wheels <<<"$missing"
  echo "installing ${wheels[*]##*/}"
  "$python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-cache-dir \
    --no-index --no-deps --no-compile --target "$site" "${wheels[@]}" ||
    complain "pip could not install these wheels; bring those of this machine's Python"
fi

"$python" - "$folder" "$preset" <<'END' || exit 2
import sys

folder, preset = sys.argv[1:]
try:
    import experiments.accelerator.__main__
    from experiments.accelerator import parcels
except ImportError as error:
    said = f"{error.name} is missing" if isinstance(error, ModuleNotFoundError) else str(error)
    sys.exit(f"start.sh: {said}: put its wheel into {folder}/wheels, see experiments/accelerator/wheels.txt")
if not preset.endswith("-reduced"):
    sys.exit(parcels.main(["join", folder]))
END

# In the background, so that a signal to this script alone reaches the training at once.
"$python" -m experiments.accelerator "$@" &
training=$!
trap 'kill -TERM "$training" 2>/dev/null || true' INT TERM
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do
  wait "$training" || status=$?
done
exit "$status"
