#!/usr/bin/env bash
# Runs the tests as other machines would, and says at the end how each went: tools/elsewhere.sh [NAME ...]
#
#   oldest                 the kernels of a processor without AVX: the last digits of every product differ
#   avx2                   those of a processor with AVX2, and without what came later
#   threads                two threads for each operation: sums are taken in another order
#   python3.12 python3.13  another Python, with the torch that the index gives it: on Linux a build for CUDA
#   newest                 the newest of everything, but for Jupyter Book 1
#
# Without a name: all of them. The first three run the chapters and the tests that compute, the others everything. They
# may be had together: OMP_NUM_THREADS=2 tools/elsewhere.sh oldest. An interpreter that is not there is left out.
#
#   PYTHON312=/where/it/is   an interpreter that is not on the PATH, for python3.12; PYTHON313 likewise
#   WHAT="notebooks/04-*"    other tests than these
set -uo pipefail
cd "$(dirname "$0")/.."
computing="tests/bench tests/data tests/experiments tests/inspection tests/models tests/train tests/weights notebooks"
reports=_build/reports
mkdir -p "$reports"

tests() {  # tests NAME WHAT VENV VARIABLE=value ...
  local name=$1 what=${WHAT:-$2} venv=$3
  shift 3
  env "$@" PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} --junitxml=$reports/elsewhere-$name.xml" \
    make --no-print-directory test VENV="$venv" WHAT="$what"
}

another_python() {  # another_python NAME VERSION: an environment of its own, with the versions of requirements.txt
  local variable=PYTHON${2/./} python
  python=${!variable:-python$2}
  if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)" != "$2" ]; then
    echo "no Python $2: $variable=/where/it/is names one"
    return 77
  fi
  tests "$1" "" "_build/$1" PYTHON="$python" TORCH_BACKEND=
}

newest() {  # as requirements.txt, without its versions
  local venv=_build/newest python
  python=${PYTHON:-python3}
  rm -rf "$venv"
  "$python" -m venv "$venv" && "$venv/bin/python" -m pip install -q --disable-pip-version-check uv || return
  sed -E '/^-c/d; s/[ ]*#.*//; /^jupyter-book/!s/==.*//; s/^(jupyter-book)==.*/\1<2/' requirements.txt > "$venv/newest.txt"
  # shellcheck disable=SC2086  # several folders are several words
  "$venv/bin/uv" pip install -q --python "$venv/bin/python" ${PIP_FIND_LINKS:+$(printf -- '--find-links %s ' $PIP_FIND_LINKS)} \
    -r "$venv/newest.txt" && "$venv/bin/uv" pip install -q --python "$venv/bin/python" --no-deps -e . || return
  touch "$venv/.done"
  "$venv/bin/python" -m pip list --format freeze 2> /dev/null | grep -iE '^(torch|numpy|matplotlib|scipy)=='
  tests newest "" "$venv"
}

run() {
  case $1 in
    oldest) tests "$1" "$computing" .venv ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE ;;
    avx2) tests "$1" "$computing" .venv ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ;;
    threads) tests "$1" "$computing" .venv OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 OMP_WAIT_POLICY=passive ;;
    python3.*) another_python "$1" "${1#python}" ;;
    newest) newest ;;
  esac
}

(($#)) || set -- oldest avx2 threads python3.12 python3.13 newest
for name; do
  if ! [[ $name =~ ^(oldest|avx2|threads|python3\.[0-9]+|newest)$ ]]; then
    echo "unknown name '$name': known are oldest, avx2, threads, python3.12, python3.13, newest" >&2
    exit 2
  fi
done
failed=0 summary=()
for name; do
  echo "== $name"
  rm -f "$reports/elsewhere-$name.xml"
  begin=$SECONDS
  run "$name"
  status=$?
  counts=$(grep -om1 '<testsuite [^>]*' "$reports/elsewhere-$name.xml" 2> /dev/null |
    sed -E 's/.*errors="([0-9]+)" failures="([0-9]+)" skipped="([0-9]+)" tests="([0-9]+)".*/\4 tests, \2 failed, \1 errors, \3 skipped/')
  case $status in
    0) ;;
    77) counts="left out: no such interpreter" ;;
    *) failed=1 counts="${counts:-did not get as far as the tests} -- FAILED" ;;
  esac
  summary+=("$(printf '%-12s%s, %d s' "$name" "$counts" $((SECONDS - begin)))")
done
printf '\n'
printf '%s\n' "${summary[@]}"
exit $failed
