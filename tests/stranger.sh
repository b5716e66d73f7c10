#!/usr/bin/env bash
# What a stranger does: builds and checks the distributions, installs the wheel into an empty environment, and uses it far from the checkout.
# It fetches what pip fetches, so it is no test of pytest's. `make stranger`, or with another interpreter `make stranger PYTHON=python3.13`.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${1:-python3}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

step() {  # a name, then a command: run it, say how long it took
  local name=$1 began=$SECONDS status
  shift
  set +e   # a condition would switch it off inside the command, too
  (set -e; "$@") > output.txt 2>&1 < /dev/null
  status=$?
  set -e
  if [ "$status" != 0 ]; then
    tail -n 40 output.txt
    echo "stranger: $name failed" >&2
    exit 1
  fi
  printf '%4d s  %s\n' $((SECONDS - began)) "$name"
}

build() {
  "$python" -m venv tools
  tools/bin/python -m pip install --quiet build twine
  git -C "$checkout" archive HEAD | tar -x --one-top-level=source  # what is committed, and nothing else
  tools/bin/python -m build --outdir dist source
  tools/bin/python -m twine check --strict dist/*
  [ "$(find dist -name '*.whl' -size -25000000c | wc -l)" = 1 ] && [ "$(find dist -name '*.tar.gz' -size -25000000c | wc -l)" = 1 ]
}

install() {
  "$python" -m venv new
  new/bin/python -m pip install --quiet "$(echo dist/*.whl)[notebooks,video,docs]"
}

commands() {
  new/bin/python -m pip install --quiet pytest
  python -m pytest -q -o addopts= -o pythonpath= "$checkout/tests/test_commands.py"
}

notebooks() {
  dino-edu notebooks book
  for name in 00_core 06_loss; do
    papermill --cwd book "book/$name.ipynb" "$name.ipynb"
  done
}

docs() {
  python source/docs/build.py site
  grep -q "self-supervised" site/index.html
  if browser=$(command -v chromium chromium-browser google-chrome | head -n 1); then
    "$browser" --headless --no-sandbox --disable-gpu --user-data-dir="$place/browser" --dump-dom "file://$place/site/nbs/06_loss.html" > page.html
    grep -q "Why must centering and sharpening come together" page.html
  fi
}

step "sdist and wheel: built, checked, each under 25 MB" build
step "wheel installed into an empty environment, with [notebooks,video,docs]" install
export PATH="$place/new/bin:$PATH" PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH
step "dino-edu --help" dino-edu --help
step "dino-edu doctor" dino-edu doctor
step "dino-edu demo" dino-edu demo
step "every command that the documents print" commands
step "dino-edu notebooks, and two of them by papermill" notebooks
step "the site, built and opened" docs
python -c "import dino_edu, sys; assert dino_edu.__file__.startswith('$place/new'); print('dino_edu', dino_edu.__version__, 'on Python', sys.version.split()[0])"
echo "$(du -sm new | cut -f 1) MB installed, $(du -sm "$(python -c 'import dino_edu; print(dino_edu.__path__[0])')" | cut -f 1) MB of it dino_edu"
