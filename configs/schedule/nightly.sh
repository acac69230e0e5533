#!/bin/sh
# One run of extract from cron: nightly.sh CONFIG.yaml [key.path=value ...]. The log goes to a file, JSON by line;
# what is printed, and so mailed by cron, is the end of it where the run failed: with 1 (went wrong), 2 (config or
# input) or 3 (done but for some shards). 4 is another run at work, which does the same; 130 and 143 a stop.
set -u
log=${CVT_LOG:-$HOME/cvt-extract.log}
credentials=${CVT_CREDENTIALS:-$HOME/.config/cvt-pipeline/credentials.env}
if [ -e "$credentials" ]; then
    set -a
    . "$credentials"
    set +a
fi
this_run=$(mktemp) || exit 1
trap 'rm -f "$this_run"' EXIT
cvt-pipeline extract "$@" run.log_format=json >"$this_run" 2>&1
code=$?
cat "$this_run" >>"$log"
case $code in
    0 | 4 | 130 | 143) ;;
    *)
        echo "cvt-pipeline extract $* ended with exit code $code; the end of $log:"
        tail -n 50 "$this_run"
        ;;
esac
exit $code
