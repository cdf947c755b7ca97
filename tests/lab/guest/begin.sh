# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What every script of a guest begins with.

# load DISK: all of its bytes. How far it has come is told on the console.
load() {
    at=0
    mib=$(($(cat "/sys/block/${1#/dev/}/size") / 2048))
    while [ "$at" -lt "$mib" ]; do
        echo "$1: $at of $mib MiB" >&2
        dd if="$1" bs=1M count=32 skip="$at" 2>/dev/null
        at=$((at + 32))
    done
}
