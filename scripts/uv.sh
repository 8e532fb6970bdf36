#!/bin/sh
# uv of a virtual environment, with the package index, links and certificates that pip is set up with on this machine.
# uv reads none of pip's settings itself. Settings of uv's own (UV_...) are kept.
#
#   scripts/uv.sh .venv/bin/python pip install -e '.[dev]'
set -eu
python=$1
shift

pip_setting() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }

index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(pip_setting index-url)}}
links=${UV_FIND_LINKS:-$(echo ${PIP_FIND_LINKS:-$(pip_setting find-links)} | tr ' ' ',')}
certificates=${SSL_CERT_FILE:-${PIP_CERT:-$(pip_setting cert)}}
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
[ -z "$links" ] || export UV_FIND_LINKS="$links"
[ -z "$certificates" ] || export SSL_CERT_FILE="$certificates"
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"

exec "$python" -m uv "$@"
