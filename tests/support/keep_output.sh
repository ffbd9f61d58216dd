#!/bin/sh
# Runs a compiler, and keeps what it says beside its object: CMake forgets it when nothing needs compiling.
object=
previous=
for word; do
  [ "$previous" = -o ] && object=$word
  previous=$word
done
"$@" >"$object.log" 2>&1
status=$?
cat "$object.log" >&2
exit $status
