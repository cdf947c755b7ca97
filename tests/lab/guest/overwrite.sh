# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Loads all of the persistent memory, stores other bytes everywhere when it is told to, and tells their sum.
set -eu
load /dev/pmem0 >/dev/null
dd if=/dev/urandom of=/tmp/new bs=1M count=16 2>/dev/null
echo loaded
read -r line
dd if=/tmp/new of=/dev/pmem0 bs=1M conv=fsync 2>/dev/null
echo "sum: $(md5sum </tmp/new)"
