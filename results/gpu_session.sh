#!/usr/bin/env bash
# Checks and measures training by CUDA graphs on a GPU that is lent for some minutes, and prints one
# table last. --out (or else $OUT, or else output/gpu_session) gets table.txt, which grows row by
# row, log.txt, and at most four more files of 16 MiB. Start it beside the main README.md:
#
#   bash results/gpu_session.sh [--device cuda|cpu] [--data PATH] [--weights FILE] [--out DIR]
#                               [--minutes M] [--only "PART ..."] [--from DIR]
#
#   node       what the machine and the code are
#   bits       whether graphs end with the bits of eager steps (gpu_bits.py)
#   replay     the time of a replay and of an eager step (gpu_replay.py)
#   speed      benchmark.py, without and with --graphs
#   pytest     the GPU tests of graphs, equal bits, waiting and memory, if pytest and pytest-xdist
#              are there
#   accuracy   the runs at the end of this file; part 1 needs --data, part 2 also --weights.
#              runs.tar gets the settings, metrics and log of each
#
# Where a command may last ten minutes, two of them do it all:
#
#   bash results/gpu_session.sh --only "node bits replay speed pytest"
#   bash results/gpu_session.sh --only "node accuracy" --data /tmp/cifar-100-python.tar.gz \
#        --weights /tmp/resnet18.pth
#
# The first needs nothing but the code. Where a call carries 64 MiB at most, the data travels in
# three calls and the weights in a fourth. Here, in a folder that git ignores:
#
#   mkdir -p output/carry && cp WEIGHTS output/carry/resnet18.pth
#   split -b 60m PATH/cifar-100-python.tar.gz output/carry/data-
#
# There, outside the checkout, in four calls of which each carries the file that it names:
#
#   cat output/carry/data-aa > /tmp/cifar-100-python.tar.gz
#   cat output/carry/data-ab >> /tmp/cifar-100-python.tar.gz
#   cat output/carry/data-ac >> /tmp/cifar-100-python.tar.gz
#   cp output/carry/resnet18.pth /tmp/
#
# Another machine needs them again. The session ends before --minutes (9) are over. The run that is
# then under way stops, and --out gets it as stopped.tar-aa and so on. Carry these and table.txt to
# another call, with --from and their folder: that goes on with the run, and skips the runs that the
# table has. Part 2's are too large for this, and start again.
#
# Three Newton-Schulz iterations with other coefficients are not tried here: they need other code.
# With --device cpu all is tiny, the images are made up, and the numbers mean nothing. The exit
# status is 1 if a part failed, or if there was no time for a check.
# shellcheck disable=SC2317  # The parts are called by their names.

device=cuda data='' weights='' out=${OUT:-output/gpu_session} minutes=9 from=''
parts='node bits replay speed pytest accuracy'
only=$parts
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?} ;;
    --data) data=${2:?} ;;
    --weights) weights=${2:?} ;;
    --out) out=${2:?} ;;
    --minutes) minutes=${2:?} ;;
    --only) only=${2:?} ;;
    --from) from=${2:?} ;;
    *) echo "gpu_session: $1 is unknown; its first lines say what there is" >&2; exit 2 ;;
  esac
  shift 2
done
# Prints what is wrong with the command, and ends.
refuse() { echo "gpu_session: $1" >&2; exit 2; }
[ -f train_resnet.py ] || refuse "start it beside the main README.md"
[[ $minutes =~ ^[0-9]+$ ]] || refuse "--minutes $minutes is no whole number"
for part in $only; do
  [[ " $parts " == *" $part "* ]] || refuse "--only $part: the parts are $parts"
done
for file in "$data" "$weights" "${from:+$from/table.txt}"; do
  [ -z "$file" ] || [ -e "$file" ] || refuse "$file is not there"
done
[ ! -e "$out/table.txt" ] || refuse "$out has the table of a session; name another folder by --out"
MARGIN=20  # seconds that a run needs beyond --max-minutes, to start and to be packed
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$out/table.txt" "$work/last.log"

left() { echo $((60 * minutes - SECONDS)); }

# Adds a row to the table: name, result, seconds.
row() { printf '%-62s %6s s  %s\n' "$1" "$3" "$2" | tee -a "$out/table.txt"; }

# Runs a command for at most $1 seconds; its lines "row: ..." go into the table, all into the log.
logged() {
  local limit=$1 line name result seconds
  if [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
  if [ "$limit" -lt 1 ]; then limit=1; fi # 0 would be no limit
  shift
  echo "== $*" >>"$out/log.txt"
  timeout -k 10 "$limit" "$@" </dev/null 2>&1 | tee "$work/last.log" | tee -a "$out/log.txt" |
    while IFS= read -r line; do
      if [[ $line == "row: "* ]]; then
        IFS='|' read -r name result seconds <<<"${line#row: }"
        row "${name% }" "${result:1:-1}" "${seconds# }"
      fi
    done
  return "${PIPESTATUS[0]}"
}

node() {
  local gpu='no GPU' commit
  [ "$device" = cpu ] || gpu=$(nvidia-smi --query-gpu=name,memory.total,driver_version \
    --format=csv,noheader) || gpu='nvidia-smi fails'
  commit=$(git describe --always --dirty 2>/dev/null || echo 'no git')
  row "node" "$gpu; $(nproc) cores; commit $commit; $(date -u '+%Y-%m-%d %H:%M') UTC" 0
  logged 60 python3 -c "
import sys, torch, torchvision
from report.runs import describe_code
print(f'row: code | torch {torch.__version__}, torchvision {torchvision.__version__}, Python '
      f'{sys.version.split()[0]}, modules {describe_code()[\"modules\"]} | 0')
torch.ones(1, device='$device').sum().item()"
}

bits() { logged 260 python3 results/gpu_bits.py "$device"; }

replay() { logged 120 python3 results/gpu_replay.py "$device"; }


# Runs the benchmark with these flags, and makes rows of its lines about training and evaluation.
benchmark() {
  local began=$SECONDS status=0 flags=(--seconds 0.5) line numbers
  [ "$device" != cpu ] || flags=(--seconds 0.01 --rounds 1 --batch-size 8)
  logged 120 python3 results/benchmark.py --device "$device" "${flags[@]}" "$@" || status=$?
  while IFS= read -r line; do
    read -ra numbers <<<"${line:36}"
    row "speed: ${line:0:36} $*" "${numbers[0]} images/s, ${numbers[1]} GFLOP/s" \
      $((SECONDS - began))
  done < <(grep -E '^(train_resnet|finetune_resnet18|plain loop),' "$work/last.log")
  return "$status"
}

speed() {
  local status=0
  benchmark || status=$?
  benchmark --graphs || status=$?
  return "$status"
}

pytest() {
  local began=$SECONDS status=0
  if ! python3 -c 'import pytest, xdist' 2>/dev/null; then
    row "pytest -m cuda" "not installed, so skipped" 0
    return 0
  fi
  # The graphs come first, for the others may take longer than there is time.
  logged 240 python3 -m pytest -m cuda -v -n 0 -p no:cacheprovider \
    -k 'graphs or same_bits or small_gpu or waits' \
    tests/test_graphs.py tests/test_engine.py tests/test_cuda.py || status=$?
  row "pytest -m cuda" "status $status, $(grep -c ' PASSED' "$work/last.log") passed, $(
    grep -c ' FAILED' "$work/last.log") failed: $(tail -n 1 "$work/last.log")" $((SECONDS - began))
  return "$status"
}

# Trains for so many epochs with a seed: script, epochs, seed, flags. Goes on with a run in $work.
# Returns 75 if there is not enough time.
train() {
  local name="$1.py --epochs $2 --seed $3" run=$1-$2-$3 status=0 seconds result eager=''
  if [ -n "$from" ] && grep -E "^$name .* % after " "$from/table.txt" | tee -a "$out/table.txt" |
    grep .; then
    return 0
  fi
  seconds=$(($(left) - MARGIN))
  # A run stops some 20 seconds before --max-minutes, and takes time to start.
  if [ "$seconds" -lt 40 ]; then
    row "$name" "not started: $(left) s are left" 0
    return 75
  fi
  local began=$SECONDS
  logged "$(left)" python3 "$1.py" --epochs "$2" --seed "$3" --device "$device" --graphs --resume \
    --output-dir "$work/$run" --max-minutes "$(awk "BEGIN { print $seconds / 60 }")" "${@:4}" ||
    status=$?
  case $status in
    0)
      result=$(sed -n 's/^final test accuracy \(.*\)% .*/\1 %/p' "$work/last.log")
      seconds=$(awk -F, 'NR == 1 { while ($++column != "seconds"); next } { sum += $column }
                         END { printf "%.1f", sum }' "$work/$run/metrics.csv")
      if grep -q 'no CUDA graphs' "$work/last.log"; then eager=', eager steps'; fi
      row "$name" "$result after $seconds s of training and tests, $(
        sed -n 's/^peak memory //p' "$work/last.log")$eager" $((SECONDS - began))
      ;;
    75)
      row "$name" "$(tail -n 1 "$work/last.log" | grep -o 'stopped in .* steps')" \
        $((SECONDS - began))
      if [ "$1" = train_resnet ]; then
        tar -cf - -C "$work" --exclude=checkpoint-previous.pt "$run" |
          split -b 15m - "$out/stopped.tar-"
      fi
      ;;
    *) row "$name" "FAILED with status $status: $(tail -n 1 "$work/last.log")" \
      $((SECONDS - began)) ;;
  esac
  [ ! -e "$work/$run/config.json" ] ||
    tar -rf "$out/runs.tar" -C "$work" "$run"/{config.json,metrics.csv,log.txt} 2>/dev/null
  return "$status"
}

# The runs, in the order of their worth: script, epochs and seeds.
RUNS='train_resnet 20 1
train_resnet 5 1
train_resnet 20 2 3
train_resnet 5 2 3
train_resnet 60 1 2 3
train_resnet 200 1 2
finetune_resnet18 4 1 2 3
finetune_resnet18 8 1
finetune_resnet18 10 1'

accuracy() {
  local script epochs seeds seed status=0 flags
  if compgen -G "$from/stopped.tar-*" >/dev/null; then
    cat "$from"/stopped.tar-* | tar -x -C "$work"
  fi
  while read -r script epochs seeds; do
    flags=(--data-dir "$data" --no-download)
    [ "$script" = train_resnet ] || flags+=(--weights "$weights")
    if [ "$device" = cpu ]; then
      flags=(--dataset synthetic --max-steps 4 --batch-size 10)
      [ "$script" = train_resnet ] || flags+=(--weights random --image-size 32)
    elif [ -z "$data" ] || { [ "$script" = finetune_resnet18 ] && [ -z "$weights" ]; }; then
      row "$script.py" "skipped: needs --data, and in part 2 --weights" 0
      break
    fi
    for seed in $seeds; do
      train "$script" "$epochs" "$seed" "${flags[@]}"
      case $? in
        0) ;;
        75) break 2 ;;
        *) status=1 ;;
      esac
    done
  done <<<"$RUNS"
  return "$status"
}

failed=0
for part in $parts; do
  [[ " $only " == *" $part "* ]] || continue
  began=$SECONDS
  if [ "$(left)" -lt 10 ]; then
    row "$part" "not started: $(left) s are left" 0
    failed=1
  elif ! "$part"; then
    row "$part" "FAILED: log.txt has the reason" $((SECONDS - began))
    failed=1
  fi
done
printf '\n== The table\n'
cat "$out/table.txt"
exit "$failed"
