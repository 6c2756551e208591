#!/bin/sh
# Prints the path of a Chromium or Chrome: that of $CHROMIUM, or the first one found.
#   tools/browser.sh             exit 1 and say what to install if there is none
#   tools/browser.sh --install   install Debian's first, if there is none (as root)
for name in "$CHROMIUM" chromium google-chrome google-chrome-stable chromium-browser \
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"; do
  if [ -n "$name" ] && command -v "$name"; then exit 0; fi
  if [ -n "$CHROMIUM" ]; then echo "CHROMIUM=$CHROMIUM is not a program" >&2; exit 1; fi
done
if [ "$1" = --install ]; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq --no-install-recommends chromium; } >&2 && command -v chromium && exit 0
fi
echo "no Chromium or Chrome found: install one (Debian: apt-get install chromium), or set CHROMIUM=/where/it/is" >&2
exit 1
