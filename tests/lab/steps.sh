# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Runs one function of the folder steps: sh -eu steps.sh FUNCTION [ARGUMENT]...

PATH=/lab:$PATH

fail() {
    echo "$*"
    exit 1
}

for part in /lab/steps/*.sh; do
    . "$part"
done

"$@"
