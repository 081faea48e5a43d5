#!/usr/bin/env bash
# Builds the docs into build/site; a warning is an error, and so is anything that a page would load
# from the network. bash launch/docs.sh serve shows them at 127.0.0.1:8000 as they are edited.
set -euo pipefail
source "$(dirname "$0")/functions.sh"
show_help "$0" "$@"
source "$(dirname "$0")/environment.sh"
install docs
export NO_MKDOCS_2_WARNING=1  # the theme's advertisement of its successor
if [ "${1:-build}" = serve ]; then exec "$VENV/bin/mkdocs" serve; fi
"$VENV/bin/mkdocs" build  # not --quiet, which loses the warnings that should be errors
if grep -rEo '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//[^" >]+' build/site --include='*.html'; then
  echo "the pages above would load these from the network" >&2
  exit 1
fi
echo "the docs are in build/site/index.html"
