#!/bin/sh
# HAProxy as Ray Serve is to start it (RAY_SERVE_HAPROXY_BINARY_PATH): see haproxy.py beside it.
exec "${MMRAG_PYTHON:-python3}" -I "${0%/*}/haproxy.py" "$@"
