#!/usr/bin/env bash
# Draws docs/report.png, the picture of the report in the README, from a run's report:
#
#     dev/report_picture.sh [out/quickstart] [docs/report.png]
#
# Writes the report anew, photographs its first HEIGHT pixels with headless Chromium and, where pngquant is installed,
# reduces the colours. Fails when the picture is larger than 200 KB. Needs: apt-get install chromium (pngquant optional).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-out/quickstart}
picture=${2:-docs/report.png}
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

"$python" -m scripts.report --out_dir "$(dirname "$run")" --run "$(basename "$run")"
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size="1200,${HEIGHT:-1130}" \
    --screenshot="$picture" "file://$(realpath "$run")/report.html" 2>/dev/null
if command -v pngquant >/dev/null; then
    pngquant --force --strip --output "$picture" 128 "$picture"
fi
bytes=$(stat -c %s "$picture")
echo "$picture: $bytes bytes"
[ "$bytes" -le 204800 ] || { echo "error: $picture is larger than 200 KB: install pngquant, or set HEIGHT lower" >&2; exit 1; }
