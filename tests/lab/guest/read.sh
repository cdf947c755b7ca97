# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Loads all of every persistent memory, and tells the sums.
set -eu
for disk in /dev/pmem*; do
    echo "sum: $(load "$disk" | md5sum)"
done
