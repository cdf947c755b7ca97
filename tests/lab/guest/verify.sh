# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Checks what earlier guests have written.
# $@: names of the files that there are, besides "other"
set -eu
mount -o dax,noinit_itable /dev/pmem0 /mnt
cd /mnt
sha256sum -c sums
found=$(ls | grep -v -x -e other -e sums -e lost+found | tr '\n' ' ')
[ "$found" = "$* " ] || { echo "there are $found"; exit 1; }
echo "sums: $(sha256sum <sums)"
cd /
umount /mnt
